"""Data as people have it: types and rows of token files, documents, data sets; what is refused."""

import json

import numpy as np
import pytest
from flax import nnx

from slt_jax.cli.documents import Tokenizer, arranged
from slt_jax.cli.inputs import Reader
from slt_jax.cli.language import open_case
from slt_jax.models import Decoder, DecoderConfig, sequence_loss
from slt_jax.models.hub import save_decoder
from slt_jax.posterior.files import token_file

CONFIG = DecoderConfig(64, 8, 16, 1, 2)
DOCUMENTS = [[1, 2, 3, 4, 5], [6, 7], [8], [9, 10, 11]]


def reader(folder=None, **options):
    settings = {"seq_len": None, "context_length": 8, "vocab_size": 64, **options}
    return Reader(lambda: folder, **settings)


@pytest.fixture
def checkpoint(tmp_path):
    """A decoder with a tokenizer: w0 ... w59, a beginning that it puts in front, and an end that it only knows."""
    tokenizers = pytest.importorskip("tokenizers")
    save_decoder(tmp_path / "model", Decoder(CONFIG, rngs=nnx.Rngs(0)))
    words = {**{f"w{i}": i for i in range(60)}, "<s>": 60, "</s>": 61}
    rules = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    rules.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    rules.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 60)])
    rules.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32", "int64", "uint64", ">i4"])
def test_npy_of_any_integer_type(dtype, tmp_path):
    np.save(tmp_path / "t.npy", np.arange(40).astype(dtype))
    source, length = reader().tokens(tmp_path / "t.npy")
    assert length == 8
    np.testing.assert_array_equal(source.fetch(np.array([1, 4])), np.arange(40).reshape(5, 8)[[1, 4]])


def test_rows_are_examples(tmp_path):
    """Kills: rows run into one another; the remainder of a row in the next example."""
    table = np.arange(60).reshape(4, 15).astype(np.int64)
    np.save(tmp_path / "t.npy", table)
    source, length = reader(context_length=20).tokens(tmp_path / "t.npy")
    assert (length, source.num_data) == (15, 4)
    source, length = reader(seq_len=6).tokens(tmp_path / "t.npy")
    assert (length, source.num_data) == (6, 8)
    np.testing.assert_array_equal(source.fetch(np.array([[3], [4]])), [[table[1, 6:12]], [table[2, :6]]])
    assert source.fingerprint() != token_file(_flat(tmp_path, table), 6).fingerprint()
    with pytest.raises(ValueError, match=r"rows of 15 tokens, less than one seq_len = 16"):
        token_file(tmp_path / "t.npy", 16)


def _flat(folder, table):
    np.save(folder / "flat.npy", table.ravel())
    return folder / "flat.npy"


def test_a_raw_file_is_never_read_as_another_type(tmp_path):
    """Kills: ids of uint32 read as pairs of uint16."""
    ids = np.random.default_rng(0).integers(1, 64, 80)
    ids.astype(np.uint16).tofile(tmp_path / "t16.bin")
    ids.astype(np.uint32).tofile(tmp_path / "t32.bin")
    ids.astype(np.int64).tofile(tmp_path / "t64.bin")
    assert reader().tokens(tmp_path / "t16.bin")[0].num_data == 10
    for name in ("t32.bin", "t64.bin"):
        with pytest.raises(ValueError, match=r"may be of uint16 or of uint32.*--dtype uint32"):
            reader().tokens(tmp_path / name)
    for name, dtype in (("t32.bin", "uint32"), ("t64.bin", "int64")):
        source, _ = reader(dtype=dtype).tokens(tmp_path / name)
        np.testing.assert_array_equal(source.fetch(np.arange(10)), ids.reshape(10, 8))
    with pytest.raises(ValueError, match=r"does not say its type, and uint16 cannot hold .* 100000"):
        reader(vocab_size=100_000).tokens(tmp_path / "t16.bin")


@pytest.mark.parametrize(
    ("how", "length", "want"),
    [
        ("pack", 4, [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ("split", 2, [[1, 2], [3, 4], [6, 7], [9, 10]]),
        ("pad", 3, ([[1, 2, 3], [4, 5, 0], [6, 7, 0], [9, 10, 11]], [3, 2, 2, 3])),
    ],
)
def test_documents_become_examples(how, length, want):
    got = arranged(DOCUMENTS, how, length, "here")
    if how == "pad":
        assert isinstance(got, dict)
        np.testing.assert_array_equal(got["tokens"], want[0])
        np.testing.assert_array_equal(got["count"], want[1])
    else:
        np.testing.assert_array_equal(got, want)


def test_padding_is_not_in_the_loss():
    """Kills: a mean over the padding; a token that attends to it."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    examples = arranged(DOCUMENTS, "pad", 5, "here")
    losses = sequence_loss(model, examples)
    alone = [float(model.losses(np.asarray([document], np.int32))[0]) for document in DOCUMENTS if len(document) > 1]
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


def test_text_as_documents(checkpoint, tmp_path):
    """Kills: no token at the beginning, none between documents, two at an end."""
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, ("w1 w2 w3", "w4 w5 </s>"), strict=True):
        file.write_text(text)
    packed, _ = reader(checkpoint, seq_len=4).text(files)
    np.testing.assert_array_equal(packed.fetch(np.arange(2)), [[60, 1, 2, 3], [61, 60, 4, 5]])
    split, length = reader(checkpoint, documents="split").text(files)
    assert length == 4
    np.testing.assert_array_equal(split.fetch(np.arange(2)), [[60, 1, 2, 3], [60, 4, 5, 61]])
    assert Tokenizer(checkpoint).plain("w1 w2") == [1, 2]


def test_data_sets_of_hugging_face(checkpoint, tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"input_ids": [[1, 2, 3, 4]] * 3, "text": ["w1 w2", "w3", "w4 w5"], "other": [1, 2, 3]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    rows, length = reader(checkpoint).dataset(str(tmp_path / "saved"))
    assert (length, rows.num_data) == (4, 3)
    text, _ = reader(checkpoint, column="text", seq_len=4).dataset(str(tmp_path / "saved"))
    np.testing.assert_array_equal(text.fetch(np.arange(2)), [[60, 1, 2, 61], [60, 3, 61, 60]])
    _, length = reader(checkpoint, column="text", documents="pad").dataset(str(tmp_path / "saved"))
    assert length == 3
    with pytest.raises(ValueError, match=r"has the columns .*Name one of text or token ids with --column"):
        reader(checkpoint, column="none").dataset(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"has token ids from 1 to 4; the vocabulary has 4"):
        reader(checkpoint, vocab_size=4).dataset(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"--dataset .*nowhere cannot be loaded"):
        reader(checkpoint).dataset(str(tmp_path / "nowhere"))


def test_lengths(checkpoint, tmp_path):
    np.save(tmp_path / "t.npy", np.arange(40))
    with pytest.raises(ValueError, match="--seq-len 9 is more than the model's context of 8"):
        open_case(checkpoint, tokens=tmp_path / "t.npy", seq_len=9)
    with pytest.raises(ValueError, match=r"names no context length. Give one with --seq-len"):
        reader(context_length=None).tokens(tmp_path / "t.npy")
    with pytest.raises(ValueError, match=r"not with --tokens and --text together"):
        open_case(checkpoint, tokens=tmp_path / "t.npy", text=[tmp_path / "t.npy"])
    case = open_case(checkpoint, tokens=tmp_path / "t.npy")
    assert (case.length, case.data.num_data) == (8, 5)
