"""What computing needs of the machine: threads, processes, copies to and from devices, memory, reads."""
