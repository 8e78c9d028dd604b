"""PyTorch models as (params, loss_fn), through the package torchax, which runs torch's operations on JAX arrays.

Nothing here imports torch before it is asked for.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from slt_jax.posterior.outputs import OUTPUTS, parts_through

Forward = Callable[..., Any]
Loss = Callable[[Forward, PyTree], Array]
LossFn = Callable[[PyTree, PyTree], Array]

# torch 2.13 no longer has these overloads, which torchax 0.0.13 names in its tables.
_REMOVED = (
    "all.dimname", "all.dimname_out", "index_add.dimname", "index_copy.dimname", "index_copy_.dimname",
    "index_fill.Dimname_Scalar", "index_fill.Dimname_Tensor", "index_fill_.Dimname_Scalar",
    "index_fill_.Dimname_Tensor", "norm.names_ScalarOpt_dim", "norm.names_ScalarOpt_dim_dtype",
    "norm.names_dtype_out", "norm.names_out", "prod.dim_Dimname", "std.correction_names", "std.correction_names_out",
    "std.names_dim", "std.names_out", "std_mean.correction_names", "std_mean.names_dim", "unbind.Dimname",
)  # fmt: skip


def from_torch(model: Any, loss: Loss) -> tuple[PyTree, LossFn]:
    """A PyTorch model as (params, loss_fn): of transformers, of TransformerLens, or any other ``torch.nn.Module``.

    The weights are copied, in float32. The loss is compiled and differentiated by JAX; the model's own Python code runs
    only while it is traced, in evaluation mode, and leaves the model as it was.

    Args:
        model: parameters that require no gradient, and all buffers (a BatchNorm's running statistics), are frozen.
        loss: ``loss(forward, batch)``, e.g. ``next_token_loss``. ``forward`` calls the model with JAX arrays, and
            returns JAX arrays in place of tensors; of an output of transformers that has ``logits``, these.

    Returns:
        ``params``: a nested dict of arrays; the path ``("transformer", "h", "0", "attn", ...)`` is the name of the
        parameter. A parameter that several modules share is there once, by its first name. ``loss_fn(params, batch)``.

    Raises:
        ImportError: torch or torchax is not installed.
        TypeError: not a module and a function.
        ValueError: the model is quantized; or, when ``loss_fn`` is first traced, the forward pass draws random numbers,
            changes a buffer, or does something that cannot be traced, such as branching on values.
    """
    torch, torchax = _torch_and_torchax()
    if not isinstance(model, torch.nn.Module):
        order = " They are in the wrong order." if isinstance(loss, torch.nn.Module) else ""
        raise TypeError(f"from_torch(model, loss) needs a torch.nn.Module first, got a {type(model).__name__}.{order}")
    if not callable(loss):
        raise TypeError(f"loss must be a function loss(forward, batch), got a {type(loss).__name__}.")
    places, weights, frozen = _places(torch, model), {}, {}
    for name, found in places.items():
        tensor = found[0].held
        moves = isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
        (weights if moves else frozen)[name] = _array(name, tensor)
    if not weights:
        raise ValueError("the model has no parameter that requires a gradient, so nothing can be sampled.")
    env = torchax.default_env()

    def evaluate(loss: Any, params: PyTree, batch: PyTree) -> Any:
        values = {**_flat(params), **frozen}

        def forward(*args: Any, **kwargs: Any) -> Any:
            return _call(torch, env, model, places, values, args, kwargs)

        return loss(forward, batch)

    def loss_fn(params: PyTree, batch: PyTree) -> Array:
        return evaluate(loss, params, batch)

    setattr(loss_fn, OUTPUTS, parts_through(loss, evaluate))
    return _nested(weights), loss_fn


def _torch_and_torchax() -> tuple[Any, Any]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ImportError("from_torch needs the extra: pip install 'slt-jax[torch]'.") from error
    for overload in _REMOVED:
        operation, name = overload.split(".")
        if not hasattr(getattr(torch.ops.aten, operation), name):
            setattr(getattr(torch.ops.aten, operation), name, object())
    try:
        torchax = importlib.import_module("torchax")
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"from_torch needs torchax 0.0.13 with torch 2.13: pip install 'slt-jax[torch]'. Importing it beside torch "
            f"{torch.__version__} failed: {error}"
        ) from error
    return torch, torchax


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without a cache of keys and values, and experts as products of fixed shapes; then as before."""
    training = [module for module in model.modules() if module.training]
    config, wanted = getattr(model, "config", None), {"use_cache": False, "_experts_implementation": "batched_mm"}
    before = {name: getattr(config, name) for name in wanted if getattr(config, name, None) is not None}
    model.eval()
    try:
        for name in before:
            setattr(config, name, wanted[name])
        with _no_look_at_padding():
            yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
        for module in training:
            module.training = True


@contextlib.contextmanager
def _no_look_at_padding() -> Iterator[None]:
    """transformers look for padding among the values of the tokens, only to warn of it."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    name = "warn_if_padding_and_no_attention_mask"
    if base is None or name not in vars(base):
        yield
        return
    before = vars(base)[name]
    setattr(base, name, lambda *_: None)
    try:
        yield
    finally:
        setattr(base, name, before)


def _one_device(torch: Any) -> Any:
    """A mode in which all tensors are on JAX's device, where a model's code moves them or makes them on its own."""
    moves = {torch.Tensor.cpu, torch.Tensor.cuda}

    class OneDevice(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func in moves:
                return args[0]
            if func is torch.Tensor.to:
                args = tuple(arg for arg in args if not _is_device(torch, arg))
                kwargs.pop("device", None)
                if len(args) == 1 and not kwargs:
                    return args[0]
            elif kwargs.get("device") is not None:
                kwargs["device"] = "jax"
            return func(*args, **kwargs)

    return OneDevice()


def _is_device(torch: Any, value: Any) -> bool:
    return isinstance(value, (torch.device, str)) or (isinstance(value, int) and not isinstance(value, bool))


def _array(name: str, tensor: Any) -> Array:
    if tensor.is_quantized or str(tensor.device) == "meta":
        raise ValueError(f"'{name}' is quantized, or has no values (device {tensor.device}). Load it in float32.")
    tensor = tensor.detach().cpu()
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    return jnp.asarray(np.array((tensor.float() if narrow else tensor).numpy()))


class _Place(NamedTuple):
    """Where a module holds a parameter or a buffer."""

    members: dict[str, Any]
    name: str

    @property
    def held(self) -> Any:
        return self.members[self.name]


def _places(torch: Any, model: Any) -> dict[str, list[_Place]]:
    """Every parameter and buffer by its first name, with all modules that share it."""
    names: dict[int, str] = {}
    places: dict[str, list[_Place]] = {}
    for prefix, module in torch.nn.Module.named_modules(model):
        if isinstance(module, torch.nn.RNNBase):
            raise ValueError(f"'{prefix}' is a {type(module).__name__}, which keeps its weights in a place of its own.")
        for members in (module._parameters, module._buffers):
            for name, tensor in members.items():
                if tensor is not None:
                    full = names.setdefault(id(tensor), f"{prefix}.{name}" if prefix else name)
                    places.setdefault(full, []).append(_Place(members, name))
    return places


@contextlib.contextmanager
def _holding(places: dict[str, list[_Place]], tensors: dict[str, Any]) -> Iterator[None]:
    """The modules hold ``tensors``; then what they held before. Raises ValueError if one was changed."""
    before = {name: found[0].held for name, found in places.items()}
    arrays = {name: tensor.jax() for name, tensor in tensors.items()}
    try:
        for name, found in places.items():
            for place in found:
                place.members[place.name] = tensors[name]
        yield
        for name, found in places.items():
            if found[0].held is not tensors[name] or tensors[name].jax() is not arrays[name]:
                raise ValueError(f"the forward pass changes '{name}'. A loss must not change weights or buffers.")
    finally:
        for name, found in places.items():
            for place in found:
                place.members[place.name] = before[name]


def _call(
    torch: Any, env: Any, model: Any, places: dict[str, list[_Place]], values: dict[str, Array], args: tuple,
    kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """The model's output for these parameters and buffers, as JAX arrays."""
    key = env.prng_key
    args, kwargs = env.j2t_iso(jax.tree.map(_on_device, (args, kwargs)))
    try:
        with _evaluating(model), _holding(places, env.j2t_iso(values)), env, _one_device(torch):
            output = model(*args, **kwargs)
        drawn = env.prng_key is not key
    finally:
        env.param.prng = key
    if drawn:
        raise ValueError(
            "the model is still random: its forward pass drew random numbers in evaluation mode. Sampling needs a loss "
            "that depends only on the weights and the batch. Turn dropout off in the model's configuration."
        )
    return _as_arrays(env, output)


def _on_device(value: Any) -> Any:
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def _as_arrays(env: Any, output: Any) -> Any:
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif isinstance(output, Mapping):
        output = {name: value for name, value in output.items() if value is not None}
    return env.t2j_iso(output)


def _flat(params: PyTree) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(str(step.key) for step in path): leaf for path, leaf in leaves}


def _nested(arrays: dict[str, Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *modules, last = name.split(".")
        branch = tree
        for module in modules:
            branch = branch.setdefault(module, {})
        branch[last] = array
    return tree
