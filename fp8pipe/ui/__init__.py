"""What people see: stage lines in the terminal, records as tables, the state of a work folder, the machine's health."""
