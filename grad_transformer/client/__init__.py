"""Phase 3 on the client's side: the TinyLM fine-tuned on private data, from the mapper's root."""

from .finetune import finetune_client


__all__ = ["finetune_client"]
