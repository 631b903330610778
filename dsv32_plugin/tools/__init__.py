"""What the command `dsv32` does, one module for each of its subcommands, and the servers that it starts."""
