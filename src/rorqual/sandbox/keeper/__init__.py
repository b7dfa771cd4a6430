"""The keeper: the small process that owns this client's sandboxes and outlives its accidents.

One keeper per client process. It does what must survive the client's kill -9: it launches each sandbox in a
private mount namespace, watches its first process, enforces its lifetime, names the cause of its end, and
removes its cgroups and files. It runs on the standard library alone and without the package's `__init__` (see
`client.py`), so that it starts in about 20 ms and stays small. See docs/decisions/0002-sandbox-keeper.md.
"""
