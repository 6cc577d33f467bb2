"""The runs behind the command lines."""
