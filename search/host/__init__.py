"""This machine: processes, cores, memory, versions."""
