"""`GradTransformer`: maps the TinyLM's LoRA delta, block by block, to the LLM's (paper, section 4.2).

Shape legend: B batch, S source blocks, L target blocks, D block width (of the widest block; narrower ones are padded
with zeros), H hidden size of the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .adapters import (
    Aggregation,
    LoraAdapter,
    aggregate_from_root,
    check_clients,
    compose_statements,
    counted_clients,
    pick_weights,
    public_identity,
)
from .adapters.base_files import locate
from .adapters.bases import load_backbone, load_config, make_backbone
from .adapters.privacy import STATEMENT_KEY, statement_of
from .configuration_grad_transformer import GradTransformerConfig
from .constants import FORMAT_VERSION
from .errors import FormatVersionError, UsageError
from .modeling_blocks import BlockEmbedding, BlockReadout, drop_token_embeddings, hidden_size_of
from .modeling_decoding import read_weights_with_every_core, roomy_cache
from .modeling_files import MapperFiles
from .tokenization_lora_delta import Adapters, LoraDeltaTokenizer


@dataclass
class GradTransformerOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`, *optional*, returned with `labels`): mean squared error over all values (equation 10).
        blocks (`torch.Tensor` of shape `(B, L, D)`): predicted standardised target blocks.
        encoder_last_hidden_state (`torch.Tensor` of shape `(B, S, H)`): the encoded source delta.
    """

    loss: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None


class GradTransformer(MapperFiles, PreTrainedModel):
    """Encoder-decoder over blocks: source delta in, target delta out.

    Args:
        config ([`GradTransformerConfig`]): shapes, backbone and decoding.

    The two tokenizers, `source_tokenizer` and `target_tokenizer`, travel with the model: `save_pretrained` writes them
    to `source/` and `target/`, `from_pretrained` reads them back, `generate_adapter` uses them.
    """

    config_class = GradTransformerConfig
    base_model_prefix = "mapper"
    main_input_name = "source_blocks"
    # The loss is a mean over blocks, so Trainer itself divides it by the accumulation steps.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: GradTransformerConfig):
        super().__init__(config)
        if config.format_version > FORMAT_VERSION:
            raise FormatVersionError(
                "The mapper was written by a newer version of grad_transformer.",
                path=config.name_or_path or None,
                expected=f"format version up to {FORMAT_VERSION}",
                found=config.format_version,
                remedy="pip install --upgrade grad-transformer",
            )
        self.backbone = make_backbone(config.backbone_config, path=config.name_or_path or None)
        drop_token_embeddings(self.backbone)
        read_weights_with_every_core(self.backbone)
        self._no_split_modules = list(self.backbone._no_split_modules or [])
        hidden_size = hidden_size_of(config.backbone_config)
        self.source_embedding = BlockEmbedding(config.source_block_types, config.source_type_widths, hidden_size)
        self.readout = BlockReadout(config.target_block_types, config.target_type_widths, hidden_size)
        self.start_block = nn.Parameter(torch.zeros(hidden_size))
        if config.decoding == "autoregressive":
            self.target_embedding = BlockEmbedding(config.target_block_types, config.target_type_widths, hidden_size)
        if config.position_embeddings or config.decoding == "parallel":
            self.target_positions = nn.Embedding(len(config.target_block_types), hidden_size)
        if config.position_embeddings:
            self.source_positions = nn.Embedding(len(config.source_block_types), hidden_size)
        # 1 where a target value exists, 0 at the padding of narrow blocks.
        widths = torch.tensor([config.target_type_widths[number] for number in config.target_block_types])
        value_mask_LD = torch.arange(max(config.target_type_widths))[None, :] < widths[:, None]
        self.register_buffer("value_mask", value_mask_LD, persistent=False)
        self.source_tokenizer: LoraDeltaTokenizer | None = None
        self.target_tokenizer: LoraDeltaTokenizer | None = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, GradTransformer):
            init.normal_(module.start_block, mean=0.0, std=std)
            widths = [self.config.target_type_widths[number] for number in self.config.target_block_types]
            values = torch.arange(max(widths), device=module.value_mask.device)
            init.copy_(module.value_mask, values[None, :] < torch.tensor(widths, device=values.device)[:, None])

    def get_input_embeddings(self) -> nn.Module:
        return self.source_embedding

    # Building

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedConfig,
        source_tokenizer: LoraDeltaTokenizer,
        target_tokenizer: LoraDeltaTokenizer,
        *,
        decoding: str = "autoregressive",
        position_embeddings: bool = True,
        initializer_range: float = 0.02,
        **model_kwargs: Any,
    ) -> GradTransformer:
        """Build a mapper between two tokenizers' block sequences.

        Args:
            backbone (`str`, `Path` or `PreTrainedConfig`): name or path of a pretrained encoder-decoder, whose weights
                are taken (all but its token embeddings and head), or a config for random weights.
            source_tokenizer, target_tokenizer ([`LoraDeltaTokenizer`]): fix block counts and widths.
            decoding, position_embeddings, initializer_range: see [`GradTransformerConfig`].
            model_kwargs: `dtype`, `revision`, `token`, ... for loading the pretrained backbone.

        Raises:
            [`UsageError`], [`HubError`]: there is no such backbone, or it is not an encoder-decoder.
        """
        pretrained = None
        if isinstance(backbone, PreTrainedConfig):
            backbone_config = backbone
        else:
            hub_kwargs = {key: value for key, value in model_kwargs.items() if key != "dtype"}
            files = locate(backbone, **hub_kwargs)
            backbone_config = load_config(files)
        if not backbone_config.is_encoder_decoder:
            raise UsageError(
                "The backbone is not an encoder-decoder.",
                path=None if isinstance(backbone, PreTrainedConfig) else backbone,
                expected="a T5, Flan-T5, BART, T5Gemma, ... model",
                found=backbone_config.model_type,
            )
        if not isinstance(backbone, PreTrainedConfig):
            pretrained = load_backbone(files, **model_kwargs)
            drop_token_embeddings(pretrained)
        source, target = source_tokenizer, target_tokenizer
        config = GradTransformerConfig(
            backbone_config=backbone_config,
            source_block_types=list(source.layout.block_types),
            source_type_widths=list(source.layout.type_widths),
            target_block_types=list(target.layout.block_types),
            target_type_widths=list(target.layout.type_widths),
            decoding=decoding,
            position_embeddings=position_embeddings,
            initializer_range=initializer_range,
            source_base_model=source.root.base_model,
            source_base_revision=source.root.base_revision,
            target_base_model=target.root.base_model,
            target_base_revision=target.root.base_revision,
        )
        model = cls(config)
        if pretrained is not None:
            model.to(pretrained.dtype)
            model.backbone.load_state_dict(pretrained.state_dict())
        model.source_tokenizer, model.target_tokenizer = source, target
        return model

    # Forward

    def forward(
        self,
        source_blocks: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> GradTransformerOutput:
        """Predict all target blocks.

        Args:
            source_blocks (`torch.Tensor` of shape `(B, S, D_source)`): standardised source blocks.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 at padding blocks.
            labels (`torch.Tensor` of shape `(B, L, D_target)`, *optional*): standardised target blocks. An
                autoregressive mapper then predicts each block from the true ones before it (teacher forcing); without
                labels it runs freely, as in [`~GradTransformer.generate_blocks`].

        Returns:
            [`GradTransformerOutput`]
        """
        if labels is None and self.config.decoding == "autoregressive":
            return GradTransformerOutput(blocks=self.generate_blocks(source_blocks, attention_mask))
        source_BSH = self._embed_source(source_blocks)
        if self.config.decoding == "parallel" or labels is None:
            target_BLH = self._queries(len(source_blocks))
        else:
            target_BLH = self._embed_target(labels)
        outputs = self.backbone(
            inputs_embeds=source_BSH,
            attention_mask=attention_mask,
            decoder_inputs_embeds=target_BLH,
            use_cache=False,
            return_dict=True,
        )
        blocks_BLD = self.readout(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            predicted_BLD, labels_BLD = blocks_BLD.float(), labels.float()
            if len(set(self.config.target_type_widths)) == 1:
                # No block is padded; at real widths the factors and powers of the general way are felt.
                loss = nn.functional.mse_loss(predicted_BLD, labels_BLD)
            else:
                error_BLD = (predicted_BLD - labels_BLD) * self.value_mask
                loss = error_BLD.square().sum() / (self.value_mask.sum() * len(labels))
        return GradTransformerOutput(
            loss=loss, blocks=blocks_BLD, encoder_last_hidden_state=outputs.encoder_last_hidden_state
        )

    def _embed_source(self, source_blocks: torch.Tensor) -> torch.Tensor:
        hidden_BSH = self.source_embedding(source_blocks)
        if self.config.position_embeddings:
            # Padding blocks lie behind the last position and are masked.
            known = min(hidden_BSH.shape[1], self.source_positions.num_embeddings)
            hidden_BSH[:, :known] = hidden_BSH[:, :known] + self.source_positions.weight[:known]
        return hidden_BSH

    def _embed_target(self, blocks_BLD: torch.Tensor) -> torch.Tensor:
        """Decoder inputs for all positions: the start block, then each true block, shifted right."""
        hidden_BLH = self.target_embedding(blocks_BLD[:, :-1])
        start_B1H = self.start_block.expand(len(blocks_BLD), 1, -1).to(hidden_BLH.dtype)
        return self._add_positions(torch.cat([start_B1H, hidden_BLH], dim=1))

    def _queries(self, batch_size: int) -> torch.Tensor:
        hidden_LH = self.start_block + self.target_positions.weight
        return hidden_LH.expand(batch_size, -1, -1)

    def _add_positions(self, hidden_BnH: torch.Tensor, start: int = 0) -> torch.Tensor:
        if not self.config.position_embeddings:
            return hidden_BnH
        return hidden_BnH + self.target_positions.weight[start : start + hidden_BnH.shape[1]]

    # Generation

    @torch.no_grad()
    def generate_blocks(
        self, source_blocks: torch.Tensor, attention_mask: torch.Tensor | None = None, *, use_cache: bool = True
    ) -> torch.Tensor:
        """Generate all target blocks from a source delta alone (equation 11).

        The encoder runs once. An autoregressive decoder takes one step for each block, with its keys and values
        cached; `use_cache=False` re-runs it on the whole prefix instead (same result, for checking).

        Args:
            source_blocks (`torch.Tensor` of shape `(B, S, D_source)`): standardised source blocks.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 at padding blocks.
            use_cache (`bool`, *optional*, defaults to `True`).

        Returns:
            `torch.Tensor` of shape `(B, L, D_target)`: standardised target blocks.
        """
        if self.config.decoding == "parallel":
            return self(source_blocks, attention_mask).blocks
        encoder_outputs = self.backbone.get_encoder()(
            inputs_embeds=self._embed_source(source_blocks), attention_mask=attention_mask, return_dict=True
        )
        step_B1H = self._add_positions(self.start_block.expand(len(source_blocks), 1, -1))
        cache = roomy_cache(self.backbone.config.get_text_config(decoder=True)) if use_cache else None
        prefix_BnH, blocks = step_B1H, []
        for index in range(len(self.config.target_block_types)):
            outputs = self.backbone(
                encoder_outputs=encoder_outputs,
                attention_mask=attention_mask,
                decoder_inputs_embeds=step_B1H if use_cache else prefix_BnH,
                past_key_values=cache,
                use_cache=use_cache,
                return_dict=True,
            )
            block_B1D = self.readout(outputs.last_hidden_state[:, -1:], start=index)
            blocks.append(block_B1D)
            if index + 1 < len(self.config.target_block_types):
                step_B1H = self._add_positions(self.target_embedding(block_B1D, start=index), start=index + 1)
                if not use_cache:
                    prefix_BnH = torch.cat([prefix_BnH, step_B1H], dim=1)
        return torch.cat(blocks, dim=1)

    @torch.no_grad()
    def generate_deltas(self, source_deltas_NP: torch.Tensor, *, batch_size: int = 64) -> torch.Tensor:
        """Raw source deltas `(N, numel_source)` to raw target deltas `(N, numel_target)`, float32 on the CPU."""
        source_tokenizer, target_tokenizer = self.tokenizers()
        training = self.training
        self.eval()
        try:
            predicted = []
            for chunk_NP in source_deltas_NP.split(batch_size):
                blocks_NSD = source_tokenizer.standardize(chunk_NP).to(self.device)
                predicted.append(target_tokenizer.unstandardize(self.generate_blocks(blocks_NSD).float().cpu()))
        finally:
            self.train(training)
        return torch.cat(predicted)

    def generate_adapter(
        self,
        adapters: Adapters,
        *,
        aggregation: Aggregation = "mean",
        order: Literal["aggregate_first", "map_first"] = "aggregate_first",
        weights: Sequence[float] | None = None,
        num_dishonest: int | None = None,
        max_norm: float | None = None,
        reference: str | Path | LoraAdapter | None = None,
        disjoint_clients: bool = False,
        allow_duplicates: bool = False,
        allow_other_recipe: bool = False,
        max_shift: float | None = None,
        predict: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **hub_kwargs: Any,
    ) -> LoraAdapter:
        """From client adapters of the TinyLM to one adapter for the LLM (paper, section 4.3).

        Args:
            adapters: one client adapter (folder, repository id, `org/name@v1.0`, or [`LoraAdapter`]) or several.
            aggregation (`str`, *optional*, defaults to `"mean"`): how several deltas become one, see
                [`aggregate_deltas`] and [`exact_mean`].
            order (`str`, *optional*, defaults to `"aggregate_first"`): `"aggregate_first"` maps the aggregated delta
                (paper); `"map_first"` maps each client's delta and aggregates the LLM's.
            weights, num_dishonest, max_norm: see [`aggregate_deltas`].
            reference (`str`, `Path` or [`LoraAdapter`], *optional*): for `"fltrust"`, a TinyLM adapter that the
                provider fine-tuned itself from the same root, on public rows.
            disjoint_clients (`bool`, *optional*, defaults to `False`): whether the clients declare that nobody's data
                is in two clients' data; decides how their privacy budgets add up, see [`compose_statements`].
            allow_duplicates (`bool`, *optional*, defaults to `False`): count an adapter as often as it is given.
            allow_other_recipe (`bool`, *optional*, defaults to `False`): map clients that state another recipe than
                the mapper's.
            max_shift (`float`, *optional*): the limit of the clients' distance from the shadows and of their norms,
                see [`check_clients`]; `inf` switches it off.
            predict (`Callable`, *optional*): raw TinyLM deltas `(N, numel_source)` to LLM deltas `(N, numel_target)`;
                default: [`~GradTransformer.generate_deltas`]. Ridge regression or a refinement go here.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` for adapters on the Hub.

        Returns:
            [`LoraAdapter`]: its `save_pretrained` folder loads with plain `PeftModel.from_pretrained`. Its metadata
            names the mapper's and the clients' versions and commits; a client whose repository is private, or that is
            no repository, is there by a hash of its values alone.

        Raises:
            [`AdapterFormatError`], [`LayoutMismatchError`], [`BaseModelMismatchError`], [`RootMismatchError`]: a
                client adapter is refused, with the reason; or what comes out is not finite.
            [`RecipeError`]: a client was fine-tuned by another recipe.
            [`UsageError`]: the mapper has no tokenizers, a client lies too far from the shadows, or the arguments do
                not fit.
        """
        source_tokenizer, target_tokenizer = self.tokenizers()
        if order not in ("aggregate_first", "map_first"):
            raise UsageError("Unknown order.", expected="aggregate_first or map_first", found=order)
        clients = [adapters] if isinstance(adapters, (str, Path, LoraAdapter)) else list(adapters)
        if not clients:
            raise UsageError("There is nothing to map.", expected="at least one client adapter", found="none")
        checked = [source_tokenizer.read_client(client, **hub_kwargs) for client in clients]
        deltas_NP = torch.stack([delta_P for _, delta_P in checked])
        names = [f"client {n}" if isinstance(given, LoraAdapter) else str(given) for n, given in enumerate(clients, 1)]
        checks = check_clients(
            [client for client, _ in checked],
            deltas_NP,
            recipe=source_tokenizer.recipe,
            reference=self.shift_reference,
            names=names,
            max_shift=max_shift,
            allow_other_recipe=allow_other_recipe,
        )
        counted = counted_clients(checks, names, allow_duplicates=allow_duplicates, disjoint_clients=disjoint_clients)
        weights = pick_weights(weights, counted, len(clients))
        given_NP, predict = deltas_NP[counted], predict or self.generate_deltas
        if reference is not None:
            # Beside the clients' deltas, so that both are mapped in the same way.
            given_NP = torch.cat([given_NP, source_tokenizer.delta(reference, **hub_kwargs)[None]])
        if order == "map_first":
            given_NP = predict(given_NP)
        delta_P, facts = aggregate_from_root(
            given_NP[: len(counted)],
            (source_tokenizer if order == "aggregate_first" else target_tokenizer).root,
            aggregation=aggregation,
            weights=weights,
            num_dishonest=num_dishonest,
            max_norm=max_norm,
            reference_P=None if reference is None else given_NP[-1],
        )
        if order == "aggregate_first":
            delta_P = predict(delta_P[None])[0]
        adapter = target_tokenizer.decode_delta(delta_P)
        shifts = [check.shift.to_dict() for check in checks if check.shift is not None]
        adapter.metadata["generated"] = {
            "source_base_model": self.config.source_base_model,
            "mapper": None if self.origin is None else self.origin.to_dict(),
            "num_clients": len(clients),
            "num_counted": len(counted),
            "clients": [public_identity(client) for client, _ in checked],
            "checks": [check.to_dict() for check in checks],
            "shift": shifts or None,
            "order": order,
            **facts,
        }
        # Of all that were given: a copy may state less than the adapter that it was copied from.
        statements = [statement_of(client.metadata) for client, _ in checked]
        adapter.metadata[STATEMENT_KEY] = compose_statements(statements, disjoint_clients=disjoint_clients)
        return adapter

    def tokenizers(self) -> tuple[LoraDeltaTokenizer, LoraDeltaTokenizer]:
        """Source and target tokenizer; raises [`UsageError`] if the mapper was built without them."""
        if self.source_tokenizer is None or self.target_tokenizer is None:
            raise UsageError(
                "The mapper has no tokenizers.",
                expected="source_tokenizer and target_tokenizer",
                found="none",
                remedy="load it with GradTransformer.from_pretrained, or build it with GradTransformer.from_backbone",
            )
        return self.source_tokenizer, self.target_tokenizer
