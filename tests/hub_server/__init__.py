"""A loopback double of the Hub for the unmodified `huggingface_hub` client; standard library only.

    with HubServer(folder, tokens={"hf_...": Account("acme")}) as server:
        server.url  # HF_ENDPOINT of the client, with HF_HUB_DISABLE_XET=1

`store.py` keeps repositories as commits over content-addressed files, `api.py` answers the Hub's routes, `server.py`
speaks HTTP and fails on demand. It binds to 127.0.0.1 alone and ends itself after a few minutes.
"""

from .server import Fault, HubServer
from .store import Account


__all__ = ["Account", "Fault", "HubServer"]
