"""The exact budget: leases, attempts, the registry of workers, heartbeats."""
