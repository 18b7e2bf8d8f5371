"""Parameters, FLOPs and KV-cache bytes as functions of the model's config alone.

One matrix product of an m x k with a k x n matrix is 2mkn FLOPs. Matrix products are all that is
counted: norms, activations, softmax and the optimizer are below one percent at any size of
interest, and the embedding lookup is no product. The backward pass does every product twice
(for the input and for the weight), so training is three times the forward pass; what
rematerialisation computes again is not counted, as in model (not hardware) FLOP utilisation.

Attention is causal: position t attends to t + 1 keys, half the square on average. The convention
of PaLM (arXiv:2204.02311, appendix B) counts the whole square and so reads higher.
"""

from jllama.config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}


def _block_matrices(config: ModelConfig) -> int:
    """Parameters of one block's matrices; each token goes through all of them once."""
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    attention = config.hidden_dim * (2 * queries + 2 * keys)  # q and output, k and v
    return attention + 3 * config.hidden_dim * config.ffn_dim


def parameter_count(config: ModelConfig) -> int:
    """All parameters, without padding of the vocabulary; a tied head is counted once."""
    embeddings = config.vocab_size * config.hidden_dim * _tables(config)
    norms = 2 * config.hidden_dim + (2 * config.head_dim if config.qk_norm else 0)
    blocks = config.num_layers * (_block_matrices(config) + norms)
    return embeddings + blocks + config.hidden_dim


def padding_count(config: ModelConfig) -> int:
    """The zeros that pad embedding and head to `ModelConfig.vocab_multiple`."""
    return (config.vocab_rows - config.vocab_size) * config.hidden_dim * _tables(config)


def _tables(config: ModelConfig) -> int:
    return 1 if config.tie_embeddings else 2


def forward_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs of logits, per token of a row that is one document of `length` tokens."""
    matrices = config.num_layers * _block_matrices(config) + config.vocab_size * config.hidden_dim
    keys_seen = (length + 1) / 2
    # Scores and weighted values, each 2 H N per key.
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * keys_seen
    return 2 * matrices + attention


def train_flops_per_token(
    config: ModelConfig, length: int, frozen: int = 0, overlay: int = 0
) -> float:
    """FLOPs of the forward and backward pass, per token of a row of `length` tokens.

    Args:
      frozen: parameters of the matrices, the head among them, whose gradient is not wanted.
      overlay: those of the matrices of an overlay, which come on top.
    """
    return 3 * forward_flops_per_token(config, length) - 2 * frozen + 6 * overlay


def kv_cache_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values that one more position adds to the cache, in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * BYTES[dtype]
