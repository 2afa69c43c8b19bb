"""What a program needs and an idea does not: command lines, errors, processes, files, the run directory."""
