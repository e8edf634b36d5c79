"""Statistics over finished trials: noise, extrapolation, forecast, selection, audit."""
