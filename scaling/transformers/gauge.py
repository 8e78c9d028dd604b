"""How many directions of weight space leave a network's function as it is, counted from its architecture.

At generic weights w* the set of weights with the same function is smooth, of the dimension counted here. With d weights
the Jacobian of the function (logits modulo their mean, at all inputs) has rank r = d - gauge_dimension, locally
constant; by the constant-rank theorem a loss that is a positive definite function of the difference of two functions is
then a nondegenerate quadratic form in r coordinates and does not see the others. So the learning coefficient at w* is
r / 2, with multiplicity 1.

Two facts are used all over. A linear map that reads the output of a norm sees it through A z + c, where z is the
normalized vector before gain and bias, in a space of ``Sizes.read`` dimensions, and c is a constant. And what is
written to the residual stream is seen in ``Sizes.write`` dimensions. Both are width - 1 for layer norms, which subtract
the mean, and width for RMS norms. Each function below counts the directions of its own parameters that change none of
the A, c and written vectors, or change them in a way that cancels. ``rank.numerical_rank`` says whether all were found.
"""

from dataclasses import dataclass

from scaling.transformers.networks import AttentionConfig, MLPConfig
from slt_jax.models import DecoderConfig

Config = DecoderConfig | MLPConfig | AttentionConfig


@dataclass(frozen=True)
class Sizes:
    """Dimensions of the residual stream that readers and writers have to do with.

    read: of a normalized vector. write: in which what is added to the stream is seen. constant: whether every linear
    reader of a norm can add a constant, by its own bias or by the norm's bias.
    """

    read: int
    write: int
    norm_bias: bool


def sizes(config: DecoderConfig) -> Sizes:
    mean_lost = config.norm == "layer" and config.norm_placement != "after"
    return Sizes(config.width - mean_lost, config.width - mean_lost, config.norm == "layer" and config.norm_bias)


def gauge_dimension(config: Config, epsilon: bool = True) -> int:
    """Dimension of the set of weights with the function of generic weights.

    Args:
      config: a decoder, a multilayer perceptron, or the block of attention.
      epsilon: whether norms have the epsilon that they add to the mean square, however small. Without it, scales are
        free that no practical nbeta resolves: ``scales``.

    Raises:
      ValueError: a layout, or a size, for which no formula has been derived.
    """
    return sum(terms(config, epsilon).values())


def terms(config: Config, epsilon: bool = True) -> dict[str, int]:
    """``gauge_dimension`` by its parts."""
    if isinstance(config, MLPConfig):
        return mlp_terms(config)
    if isinstance(config, AttentionConfig):
        return attention_terms(config)
    check(config)
    found = {
        "embedding": embedding(config), "norms": norms(config), "query-key": query_key(config),
        "value-output": value_output(config), "written mean": written_mean(config), "MLP units": mlp_units(config),
        "constants": constants(config), "output": output(config), "rotations": rotations(config),
    }  # fmt: skip
    return found if epsilon else {**found, "scales": scales(config)}


def embedding(config: DecoderConfig) -> int:
    """Tokens and positions: what the sum x = tokens[t] + positions[i] does not see.

    Learned positions: a vector u of the written space added to all tokens and taken from all positions, ``write``
    directions. It changes the logits of a tied head by u . (final norm), the same for all tokens, which the softmax
    does not see; a softcap makes it visible, so that it counts for an untied head only.
    Layer norms: the mean over components of each token and each position. A tied head sees that of the tokens, through
    the gain; only the same number for all of them cancels in the softmax, 1 (none with a softcap).
    """
    learned, softcap = config.positions == "learned", config.logit_softcap is not None
    found = 0
    if learned and not (config.tied_head and softcap):
        found += sizes(config).write
    if config.norm == "layer":
        found += config.context_length if learned else 0
        found += config.vocab_size if not config.tied_head else 1 - softcap
    return found


def norms(config: DecoderConfig) -> int:
    """Gains and biases of the norms that linear maps read, except the last, and the readers' answer to the mean.

    A = P diag(gain) W with P the projection on the normalized space: the gain is absorbed by the readers, width
    directions. The constant c = W' bias + reader's bias: width directions of the norm's bias are absorbed too, by the
    readers' own biases, or else by W' 1, which P hides from A. Readers with a bias of their own, or of a norm without
    one, leave W' 1 invisible: a number for each of their outputs.
    """
    if config.norm_placement == "after":
        return 0
    width, size = config.width, sizes(config)
    attention = (config.num_heads + 2 * config.num_kv_heads) * config.head_width
    up = (1 + config.gated_mlp) * config.mlp_width
    count = 1 if config.shared_norm else 2
    each = count * (width * config.norm_scale + width * size.norm_bias)
    if config.norm == "layer":
        each += attention * (config.qkv_bias or not size.norm_bias) + up * (config.mlp_bias or not size.norm_bias)
    return config.num_layers * each


def product_gauge(inner: int, before: int, after: int) -> int:
    """Dimension of the pairs (X, Y) with the same product X Y, ``(before, inner)`` times ``(inner, after)``, generic.

    The product has rank r = min of the three, and such matrices have r (before + after - r) dimensions. It is inner^2,
    the dimension of GL(inner), where the inner width is the smallest.
    """
    rank = min(inner, before, after)
    return inner * (before + after) - rank * (before + after - rank)


def query_key(config: DecoderConfig) -> int:
    """Queries and keys of each group of heads that share a key: score = q' k.

    Not rotated components: (queries of all heads of the group) times key, ``product_gauge``; the constant of the key
    adds the same number to all scores of a query and cancels in the softmax (not under a softcap on the scores).
    Rotated: (W_q, W_k) -> (W_q B, W_k C) with B' R_t C = R_t for the rotations R_t of all distances t; t = 0 says
    B' = C^-1, and C commutes with rotations of different frequencies: a complex number for each pair, so 2.
    Norms of queries and keys, gains g_q and g_k shared by the heads: what is left is g_q t and g_k / t, for each
    component, and for each pair of rotated ones. With a norm over all heads together: for each key head.
    Without gains: the rotations of query and key together, within a pair or within the components that do not turn.
    """
    size, group = sizes(config), config.num_heads // config.num_kv_heads
    constant = config.qkv_bias or (size.norm_bias and config.norm_placement != "after")
    found = 0
    for layer in range(config.num_layers):
        turned = config.positions == "rotary" and layer not in config.unrotated_layers
        rotated = config.rotary_width if turned else 0
        still = config.head_width - rotated
        if config.qk_norm and config.norm_scale:
            found += (config.num_kv_heads if config.joint_qk_norm else 1) * (rotated // 2 + still)
        elif config.qk_norm:
            found += config.num_kv_heads * (rotated // 2 + still * (still - 1) // 2)
        else:
            softcap = config.attention_softcap is not None
            keys = size.read + (constant and softcap)
            hidden = still if constant and not softcap else 0
            products = product_gauge(still, group * (size.read + constant), keys)
            found += config.num_kv_heads * (rotated + products + hidden)
    return found


def value_output(config: DecoderConfig) -> int:
    """Values and outputs of each group of heads: W_v (O_1, ..., O_group) is all that is seen, ``product_gauge``.

    The constant of the values passes through the softmax, whose weights add up to 1: it is counted in ``constants``.
    """
    size, group = sizes(config), config.num_heads // config.num_kv_heads
    return config.num_layers * config.num_kv_heads * product_gauge(config.head_width, size.read, group * size.write)


def constants(config: DecoderConfig) -> int:
    """Constant vectors that attention adds to the stream: those of the values, and its own bias, and the MLP's.

    Values: c (O_1 + ... + O_group) for the constant c of each key head, in all ``num_kv_heads * head_width`` numbers.
    The bias of the output holds all of these vectors. Without it they span at most ``write`` dimensions.
    A parallel MLP adds its own bias at the same place, unless a norm stands between: then one of the two is idle.
    """
    size = sizes(config)
    numbers = config.num_kv_heads * config.head_width * (config.qkv_bias or (size.norm_bias and _read_by_norms(config)))
    together = config.parallel_residual and config.norm_placement == "before" and config.mlp_bias
    seen = 0 if config.out_bias else min(size.write, numbers)
    extra = numbers - seen
    if together:
        extra += size.write if config.out_bias else seen
    return config.num_layers * extra


def written_mean(config: DecoderConfig) -> int:
    """Layer norms: what attention and MLP write along the vector of ones, a number for each row of their last map.

    With norms after attention and MLP those subtract it, and the mean of their bias is not seen by the next norm.
    """
    if config.norm != "layer":
        return 0
    rows = config.num_heads * config.head_width + config.out_bias + config.mlp_width + config.mlp_bias
    after = 2 * config.norm_bias if config.norm_placement == "around" else 0
    return config.num_layers * (rows + after)


def mlp_units(config: DecoderConfig) -> int:
    """Scales of hidden units: s > 0 on what comes in and 1 / s on what goes out.

    ReLU: one a unit. Gated: one a unit, of the linear arm, and with a ReLU gate another. GELU and SiLU: none.
    """
    each = config.gated_mlp + (config.activation == "relu")
    return config.num_layers * config.mlp_width * each


def output(config: DecoderConfig) -> int:
    """Final norm and head: logits = E (gain z + bias) + head bias, modulo a constant.

    Untied: all that is seen is A, ``(vocab_size, read)``, and c, ``(vocab_size,)`` where there is a constant, each
    modulo the same row for all tokens (not under a softcap); the rest of the parameters is not.
    Tied: the embedding is fixed by the input, and the gain is seen. The bias of the norm is absorbed by a bias of the
    head, which has the constant of the softmax too; without one it is seen.
    """
    width, vocabulary = config.width, config.vocab_size
    softcap, bias = config.logit_softcap is not None, config.norm == "layer" and config.norm_bias
    if config.tied_head:
        return width * (bias and config.head_bias) + (config.head_bias and not softcap)
    read = width - (config.norm == "layer")
    parameters = width * config.norm_scale + width * bias + vocabulary * width + vocabulary * config.head_bias
    seen = (vocabulary - (not softcap)) * (read + (bias or config.head_bias))
    return parameters - seen


def rotations(config: DecoderConfig) -> int:
    """Rotations of the residual stream that norms commute with: SO(read), absorbed by all that reads and writes it.

    They need that every reader and writer is a free matrix: not with a gain between output and stream (norms after),
    nor with a tied head, E on both sides of the last gain.
    """
    if config.tied_head or config.norm_placement != "before":
        return 0
    read = sizes(config).read
    return read * (read - 1) // 2


def scales(config: DecoderConfig) -> int:
    """Scales that only the epsilon of a norm breaks: of the residual stream, and of all that a norm alone reads.

    The stream: all that is written times s; the tied head's logits grow by s, and the last gain makes up for it. Norms
    after attention and MLP: what they read, one each. Norms of queries and keys: one a head, or one for all together.
    """
    found = 1
    if config.norm_placement != "before":
        found += 2 * config.num_layers
    if config.qk_norm:
        found += config.num_layers * (2 if config.joint_qk_norm else config.num_heads + config.num_kv_heads)
    return found


def mlp_terms(config: MLPConfig) -> dict[str, int]:
    """A scale a hidden unit for ReLU, none for tanh and GELU; and a column added to all logits' weights alike."""
    hidden = sum(config.widths[1:-1])
    return {
        "MLP units": hidden if config.activation == "relu" else 0,
        "output": config.widths[-2] + config.biases,
    }


def attention_terms(config: AttentionConfig) -> dict[str, int]:
    """The block without norms: everything is linear in the stream, which any matrix of GL(width) may transform.

    Query-key and value-output: GL(head_width) each, ``product_gauge``. A vector between tokens and positions, and a row
    added to the whole head: width each.
    """
    width, inner = config.width, config.head_width
    if config.vocab_size + config.context_length - 1 < width or config.vocab_size <= width:
        raise ValueError(f"vocab_size must be above width = {width}, got {config.vocab_size}: tokens must span it.")
    return {
        "embedding": width, "query-key": config.num_heads * product_gauge(inner, width, width),
        "value-output": config.num_heads * product_gauge(inner, width, width), "output": width,
        "rotations": width**2,
    }  # fmt: skip


def _read_by_norms(config: DecoderConfig) -> bool:
    return config.norm_placement != "after"


def check(config: DecoderConfig) -> None:
    """Raise ValueError for what the formula has not been derived for."""
    size = sizes(config)
    tokens = size.read + 1 + (config.norm == "layer" and config.tied_head)
    points = config.vocab_size * (config.context_length if config.positions == "learned" else 1)
    unit = (1 + config.gated_mlp) * (size.read + 1) + size.write
    refused = {
        f"vocab_size must be at least {tokens}: fewer do not span what the first layer and the head read": (
            config.vocab_size < tokens
        ),
        "width must be at least 3 with layer norms": config.norm == "layer" and config.width < 3,
        "context_length must be at least 3": config.context_length < 3,
        "a head of width 1 under a query-key norm has only a sign": config.qk_norm and config.head_width < 2,
        "norms without a gain are not derived for a tied head, nor after attention and MLP": (
            not config.norm_scale and (config.tied_head or config.norm_placement != "before")
        ),
        "norm_placement 'after' is derived for RMS norms without biases, untied only": (
            config.norm_placement == "after"
            and (config.norm == "layer" or config.qkv_bias or config.out_bias or config.mlp_bias or config.tied_head)
        ),
        "with norm_placement 'around' a parallel residual is not derived": (
            config.norm_placement == "around" and config.parallel_residual
        ),
        "a parallel MLP of the first layer sees too few different vectors: raise vocab_size": (
            config.parallel_residual and points * size.write < 1.5 * config.mlp_width * unit
        ),
    }
    if reasons := [reason for reason, true in refused.items() if true]:
        raise ValueError(f"no gauge formula for this layout: {'; '.join(reasons)}. Got {config}.")
