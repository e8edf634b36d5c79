"""One worker: its loop, one trial, the device it trains on, stopping."""
