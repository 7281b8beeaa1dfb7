"""What this machine offers: cores, devices, network interfaces, processes, scratch folders."""
