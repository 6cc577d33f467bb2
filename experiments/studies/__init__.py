"""Studies that verify or demonstrate one property each; every module has its own command line."""
