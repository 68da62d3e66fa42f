"""What a user meets before any science: imports, extras, and what the wheel holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sg_lightning
from sg_lightning import _optional

ROOT = Path(__file__).parent.parent
PLAIN_ROOMS = [
    "neurons", "encoding", "backbones", "domains", "threats", "attacks", "objectives", "metrics", "evaluation", "reporting",
]  # fmt: skip
HEAVY = ["lightning", "matplotlib", "wandb", "torchvision", "tonic", "h5py", "sklearn", "tensorboard"]


def loaded_after(statement: str) -> set[str]:
    """Return which of HEAVY are loaded by a statement in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(' '.join(m for m in {[*HEAVY, 'torch']!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bare_import_loads_nothing_heavy():
    assert loaded_after("import sg_lightning") == set()


def test_plain_rooms_load_neither_lightning_nor_extras():
    statement = "\n".join(f"import sg_lightning.{room}" for room in PLAIN_ROOMS)
    assert loaded_after(statement) <= {"torch"}


def test_lightning_rooms_load_no_extras():
    loaded = loaded_after("import sg_lightning.modules, sg_lightning.callbacks, sg_lightning.datamodules")
    # Lightning itself loads some of these when they are installed; the rest would be ours.
    assert loaded - loaded_after("import lightning.pytorch") <= {"torch"}


def test_the_four_names_of_a_newcomer():
    for name in ("SparseGradient", "RobustnessEvaluation", "SpikingClassifier", "evaluate"):
        assert getattr(sg_lightning, name).__name__ == name
        assert name in dir(sg_lightning)
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = sg_lightning.Nonsense


@pytest.mark.parametrize("room", ["neurons", "backbones", "threats", "attacks", "objectives", "metrics", "evaluation",
                                  "reporting", "modules", "callbacks", "datamodules"])  # fmt: skip
def test_every_public_name_exists(room):
    module = __import__(f"sg_lightning.{room}", fromlist=["*"])
    assert module.__all__
    assert all(hasattr(module, name) for name in module.__all__)


def test_missing_extra_is_one_sentence():
    with pytest.raises(ImportError, match=r"^Plots needs nowhere: pip install 'sg-lightning\[report\]'$"):
        _optional.require("nowhere.at_all", "report", "Plots")


def test_wheel_ships_data_suites_and_licences(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "sg_lightning/py.typed",
        "sg_lightning/attacks/suites/quick.yaml",
        "sg_lightning/attacks/suites/basic.yaml",
        "sg_lightning/datamodules/data/digits.npz",
        "sg_lightning/reporting/template.html",
    ):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("digits.LICENSE.txt") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "examples/")) for name in names)
