"""The commands of `rorqual`, one module each. A module has `register(app)`; cli.py lists the modules.

A command parses, calls one public function and prints. Data goes to stdout, progress to stderr.
"""
