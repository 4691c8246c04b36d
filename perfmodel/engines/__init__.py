"""Serving engines from the outside: their documented options, their command lines, and the commands of a plan."""
