"""The algorithms on Flower: the same files, clients and servers on machines of their own.

``python -m spafl.flower CONFIG.toml --out RUN`` starts a run on a federation; ``docs/deployment.md`` says how to set
one up. Flower itself (``pip install -e '.[flower]'``) is only needed by :mod:`.strategy` and the two apps: what a
server and a client do is in :mod:`.server` and :mod:`.client`, over any link that carries bytes.
"""

__all__: list[str] = []
