"""The few network parts of our own. This module imports torch, so the others import it only when they load."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional


class PooledFeatures(nn.Module):
    """The pooled output of a timm model before its classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, dim)."""
        features: Tensor = self.model.forward_head(self.model.forward_features(images), pre_logits=True)  # type: ignore[operator]
        return features


class ImageTower(nn.Module):
    """`encode_image` of an open_clip model whose image tower alone does not give it (CoCa)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, dim), not normalised."""
        features: Tensor = self.model.encode_image(images, normalize=False)  # type: ignore[operator]
        return features


class TextTower(nn.Module):
    """`encode_text` of an open_clip model, without the parts of the model that it does not use."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        half = copy.copy(model)
        # open_clip has no text tower that stands alone, so this is its model with the other half left out. The tensors
        # are shared; the two dictionaries are not, or the model itself would lose that half.
        half._modules = {name: part for name, part in model._modules.items() if name not in ("visual", "text_decoder")}
        half._parameters = {
            name: tensor for name, tensor in model._parameters.items() if name not in ("logit_scale", "logit_bias")
        }
        self.model = half

    def forward(self, tokens: Tensor) -> Tensor:
        """(T, context length) to (T, dim), not normalised."""
        features: Tensor = self.model.encode_text(tokens, normalize=False)  # type: ignore[operator]
        return features


class SentenceEmbedding(nn.Module):
    """The embedding that the modules of a sentence-transformers model end in."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """A tokenizer's tensors of T rows to (T, dim)."""
        # The modules write their results into the dictionary that they are given.
        features: Tensor = self.network(dict(tokens))["sentence_embedding"]
        return features


class Normalize(nn.Module):
    """Scale rows to L2 norm 1."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, dim) to (B, dim)."""
        return functional.normalize(features, dim=-1)


class ZeroShot(nn.Module):
    """Softmax over the cosine similarities of an image to a fixed list of texts."""

    texts: Tensor

    def __init__(self, tower: nn.Module, texts: Tensor, scale: float) -> None:
        super().__init__()
        self.tower = tower
        self.scale = scale
        self.register_buffer("texts", functional.normalize(texts, dim=-1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, number of texts), rows sum to 1."""
        features = functional.normalize(self.tower(images), dim=-1)
        return torch.softmax(self.scale * features @ self.texts.T, dim=-1)
