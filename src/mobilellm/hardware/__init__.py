"""What this machine is: the table of known devices, probes, memory, profiling and a description for
the record."""
