import dataclasses
import json
import shutil
import subprocess
import sys
from typing import NamedTuple

import chex
import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import losses, nn, training
from jaxnet.contract import UserError

KEY = jax.random.key(5)
MODEL = nn.mlp([8, 3])
LOSS = losses.mean_loss(MODEL.apply, losses.softmax_cross_entropy)
PARAMS = MODEL.init(KEY, (4,))
DATA = jax.random.normal(KEY, (20, 4)), jax.random.randint(KEY, (20,), 0, 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Custom:
    weight: jax.Array
    name: str = dataclasses.field(metadata={"static": True})


class Pair(NamedTuple):
    first: object
    second: object


class Net(equinox.Module):
    linear: equinox.nn.Linear
    activation: object


def multi_transform():
    labels = ({"kernel": "a", "bias": "b"}, (), {"kernel": "b", "bias": "a"})
    return optax.multi_transform({"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)}, labels)


TREES = {
    "keys": {
        "key": KEY,
        "keys": jax.random.split(KEY, 3),
        "rbg": jax.random.key(1, impl="rbg"),
        "raw": jnp.ones(2, "u4"),
    },
    "none": {"a": None, "b": (jnp.ones(2), None)},
    "named": Pair(Pair(jnp.ones((2, 3)), None), jnp.int32(4)),
    "multi_transform": multi_transform().init(PARAMS),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, KEY), optax.sgd(0.1)).init(PARAMS),
    "inject": optax.inject_hyperparams(optax.adamw)(0.1).init(PARAMS),
    "dataclass": Custom(jnp.arange(3.0), "w"),
    "equinox": equinox.filter(Net(equinox.nn.Linear(3, 2, key=KEY), jax.nn.relu), equinox.is_array),
    "half": {"b": jnp.array([1.5, np.nan, -np.inf], jnp.bfloat16), "h": jnp.ones(2, jnp.float16)},
    "others": {"i": jnp.ones(3, jnp.int4), "c": jnp.array([1 + 2j]), "t": jnp.array(True), "e": jnp.zeros((0, 3))},
    "numbers": {"int": 3, "float": 0.1, "bool": True, "numpy": np.arange(3), "double": np.float64(0.1)},
    "weak": {"number": jnp.asarray(2.5)},
    "names": {"a.b/c": jnp.ones(1), "a": {"b/c": jnp.zeros(1)}, "1": jnp.zeros(2), "ω": jnp.ones(1)},
    "alone": jnp.arange(4.0),
}


@pytest.mark.parametrize("name", TREES)
def test_what_is_saved_comes_back_bit_by_bit(name, tmp_path):
    tree = TREES[name]
    training.save(tmp_path / "tree", tree)
    back = training.restore(tmp_path / "tree", tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for came, leaf in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert type(came) is type(leaf)
        assert getattr(came, "weak_type", None) == getattr(leaf, "weak_type", None)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            assert came.dtype == leaf.dtype
            came, leaf = jax.random.key_data(came), jax.random.key_data(leaf)
        assert np.asarray(came).dtype == np.asarray(leaf).dtype
        assert np.asarray(came).tobytes() == np.asarray(leaf).tobytes()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, tree)
    described = lambda tree: [(type(x), np.shape(x), getattr(x, "dtype", None)) for x in jax.tree.leaves(tree)]
    assert described(training.restore(tmp_path / "tree", abstract)) == described(tree)


def test_what_is_there_is_not_written_over_and_what_cannot_be_saved_is_named(tmp_path):
    training.save(tmp_path / "a", PARAMS)
    with pytest.raises(FileExistsError, match="is there already"):
        training.save(tmp_path / "a", PARAMS)
    for leaf in ("text", jax.nn.relu, np.array(["a"])):
        with pytest.raises(TypeError, match=r"\['f'\]: expected an array or a number"):
            training.save(tmp_path / "b", {"f": leaf})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


fit = lambda start, **options: training.fit(
    LOSS,
    start,
    options.pop("data", DATA),
    options.pop("make", optax.adam),
    **{"learning_rate": 0.01, "batch_size": 6, "num_epochs": 4, "key": KEY, **options},
)
begun = lambda make=optax.adam, params=PARAMS: training.init_state(params, make(0.01))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with the checkpoints of epochs 2, 3 and 4; not to be written into."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    fit(PARAMS, observers=[training.Checkpoints(folder, keep=3)])
    return folder


OTHERS = {
    "shape": (
        begun(params=nn.mlp([9, 3]).init(KEY, (4,))),
        r"state\.params\[0\]\['bias'\]: expected float32 of shape \(9,\), got float32 of shape \(8,\)",
    ),
    "dtype": (
        begun(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)),
        r"params\[0\]\['bias'\]: expected bfloat16 of shape \(8,\), got float32",
    ),
    "deeper": (begun(params=nn.mlp([8, 8, 3]).init(KEY, (4,))), r"expected float32 of shape .*, got"),
    "optimizer": (begun(optax.sgd), r"opt_state\[0\]\.count: expected nothing of this name, got int32 of shape \(\)"),
    "optimizer of the same leaves": (begun(optax.adabelief), "ScaleByBeliefState.* got one of .*ScaleByAdamState"),
    "params": (PARAMS, "expected the TrainState that the run began with, got tuple"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_runs_checkpoint_is_refused_in_a_sentence(name, kept):
    like, words = OTHERS[name]
    with pytest.raises(UserError, match=words) as caught:
        training.restore(kept, like)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 5}, "batch_size: the run to go on with has 6, got 5"),
        ({"key": jax.random.key(6)}, "key: the run to go on with has"),
        ({"metrics": {"loss": LOSS}}, r"metrics: the run to go on with has \[\], got \['loss'\]"),
        ({"validation": DATA}, "validation: the run to go on with has False, got True"),
        ({"make": optax.sgd}, "its opt_state belongs to another optimizer"),
    ],
)
def test_fit_refuses_to_go_on_with_another_run(options, words, kept):
    with pytest.raises(ValueError, match=words):
        fit(training.restore(kept, begun()), **options)


def test_no_checkpoint_a_foreign_one_and_one_of_another_version_are_told_apart(kept, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is none"):
        training.restore(tmp_path / "nothing", begun())
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(FileNotFoundError, match="expected a folder that save or Checkpoints wrote"):
        training.restore(tmp_path / "checkpoint", begun())
    shutil.copytree(kept / "4", tmp_path / "old")
    about = json.loads((tmp_path / "old" / "about.json").read_text())
    (tmp_path / "old" / "about.json").write_text(json.dumps({**about, "format": 0}))
    with pytest.raises(UserError, match="expected format 1, got 0, of another version"):
        training.restore(tmp_path / "old", begun())


@pytest.mark.parametrize("harm", ["cut off", "empty", "gone", "a bit flipped"])
def test_any_damage_is_seen_and_the_one_before_is_taken_and_told(harm, kept, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(kept, folder)
    good = training.restore(kept / "3", begun())
    for file in [path for path in (kept / "4").rglob("*") if path.is_file()]:
        harmed, content = folder / file.relative_to(kept), file.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        harmed.write_bytes({"cut off": content[:middle], "a bit flipped": flipped}.get(harm, b""))
        if harm == "gone":
            harmed.unlink()
        # A bit of the digests' own file may fall into white space, or make it say another shape.
        if file.name != "about.json" or harm != "a bit flipped":
            with pytest.warns(RuntimeWarning, match=r"run/4: .*; going on from .*run/3, which is whole"):
                chex.assert_trees_all_equal(training.restore(folder, begun()), good)
            with pytest.raises(
                (UserError, FileNotFoundError), match="run/4: (is damaged|about.json|expected a folder)"
            ):
                training.restore(folder / "4", begun())
        harmed.write_bytes(content)


# Two to a mesh of four and back.
ON_A_MESH = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxnet import training
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
mesh = jax.make_mesh((int(sys.argv[2]),), ("data",), axis_types=(AxisType.Auto,))
x = jax.device_put(jnp.arange(32.0).reshape(8, 4), NamedSharding(mesh, P("data")))
tree = {"x": x, "key": jax.device_put(jax.random.key(3), NamedSharding(mesh, P())), "free": jnp.ones(3)}
if sys.argv[3] == "save":
    training.save(sys.argv[1], tree)
for like in (tree, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)):
    back = training.restore(sys.argv[1], like)
    assert back["x"].sharding.is_equivalent_to(x.sharding, 2), back["x"].sharding
    np.testing.assert_array_equal(back["x"], np.arange(32.0).reshape(8, 4))
    np.testing.assert_array_equal(jax.random.key_data(back["key"]), jax.random.key_data(tree["key"]))
assert not training.restore(sys.argv[1], tree)["free"].committed
"""


def test_a_checkpoint_comes_back_on_another_number_of_devices(tmp_path):
    for devices, what in ((4, "save"), (2, "restore")):
        program = [sys.executable, "-W", "error", "-c", ON_A_MESH, str(tmp_path / "tree"), str(devices), what]
        done = subprocess.run(program, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
