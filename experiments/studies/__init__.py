"""Experiments that verify or show one thing each, with a command line of their own."""
