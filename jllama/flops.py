"""Parameters, FLOPs and KV-cache bytes as functions of the model's config alone.

The product of an m x k and a k x n matrix is 2mkn FLOPs. Only matrix products are counted: norms,
activations, softmax and the optimizer are below one percent at any size of interest, and the
embedding lookup is no product. The backward pass has two products for each one of the forward pass
(the gradients of input and weight), so training is three times the forward pass. The recomputation
of rematerialisation is not counted, as in model (not hardware) FLOP utilisation.

Attention is causal: position t attends to t + 1 keys, half the square on average. The convention
of PaLM (arXiv:2204.02311, appendix B) counts the whole square and so reads higher.
"""

from jllama.config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}


def _block_matrices(config: ModelConfig) -> int:
    """Parameters of one block's matrices; each token is multiplied with all of them once."""
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
    """FLOPs of the forward pass per token, for a row that is one document of `length` tokens."""
    matrices = config.num_layers * _block_matrices(config) + config.vocab_size * config.hidden_dim
    keys_seen = (length + 1) / 2
    # Scores and weighted values, each 2 H N per key.
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * keys_seen
    return 2 * matrices + attention


def train_flops_per_token(
    config: ModelConfig, length: int, frozen: int = 0, overlay: int = 0
) -> float:
    """FLOPs of the forward and backward pass per token, for a row of `length` tokens.

    Args:
      frozen: parameters of matrices, including the head, whose gradient is not computed.
      overlay: parameters of an overlay's matrices, which add their own products.
    """
    return 3 * forward_flops_per_token(config, length) - 2 * frozen + 6 * overlay


def kv_cache_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values that one position takes in the cache, over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * BYTES[dtype]
