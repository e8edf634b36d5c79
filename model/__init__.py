"""The block network and how one network is trained, evaluated and saved."""
