"""What this machine is: device table, probes, memory, description."""
