"""Random numbers that nobody can guess: an AES-256 keystream, keyed by the operating system.

torch's generators are made for simulation: the state of the CPU's follows from 32 bits of its seed, so that whoever
has the adapter can try all of them and take the noise away again. What the privacy of a client rests on is drawn here.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


# Values of one pass: what it needs (eight words for two values) stays in the processor's cache.
_CHUNK = 2**15
# Two Gaussians from two uniforms, four times over; see `SecureRandom.normal`.
_DRAWS = 4


class SecureRandom:
    """A stream of random numbers from AES-256 in counter mode. It has no seed, and cannot be copied or stored.

    Args:
        known_seed (`int`, *optional*): makes the stream repeatable and *guessable*: for tests and simulations.
    """

    NAME = "aes-256-ctr"

    def __init__(self, *, known_seed: int | None = None):
        key = secrets.token_bytes(32) if known_seed is None else known_seed.to_bytes(32, "little", signed=True)
        self.is_secret = known_seed is None
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> torch.Tensor:
        """Uniform 64-bit words, int64 `(count,)`."""
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        return torch.frombuffer(bytearray(self._encryptor.update(bytes(8 * count))), dtype=torch.int64)

    def uniform(self, count: int) -> torch.Tensor:
        """Multiples of 2^-53 in [0, 1), float64 `(count,)`."""
        return (self.words(count) & (2**53 - 1)).double().mul_(2.0**-53)

    def normal(self, shape: Sequence[int], std: float) -> torch.Tensor:
        """Gaussian noise of mean 0, float64, on the CPU.

        Each value is half the sum of four Gaussians (Box and Muller's, from uniforms of 63 bits, so that tails reach
        beyond nine standard deviations). Of a single one the floating-point representation betrays what it was added
        to; of a sum of four, finding it takes 2^159 attempts (Holohan and Braghin, 2021; Opacus' secure mode).
        """
        numel = math.prod(shape)
        values = torch.empty(numel, dtype=torch.float64)
        for start in range(0, numel, _CHUNK):
            part = values[start : start + _CHUNK]
            pairs = (len(part) + 1) // 2
            radius_DP, angle_DP = self.words(2 * _DRAWS * pairs).view(2, _DRAWS, pairs)
            radius_DP = (radius_DP & (2**63 - 1)).double().add_(0.5).mul_(2.0**-63).log_().mul_(-2.0).sqrt_()
            angle_DP = (angle_DP & (2**53 - 1)).double().mul_(2.0 * math.pi * 2.0**-53)
            part[:pairs] = (radius_DP * angle_DP.cos()).sum(dim=0)
            part[pairs:] = (radius_DP * angle_DP.sin()).sum(dim=0)[: len(part) - pairs]
        return values.mul_(std / math.sqrt(_DRAWS)).view(*shape)

    def sample(self, count: int, size: int) -> list[int]:
        """`size` different numbers below `count`, each set equally likely; all of them where there are fewer."""
        if count <= size:
            return list(range(count))
        return self.uniform(count).argsort()[:size].tolist()
