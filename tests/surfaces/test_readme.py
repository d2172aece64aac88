"""What the README tells people to type works, and what it shows is accepted."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster.installed import Runs

from controller.preflight import load_run
from controller.yaml_text import parse_yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


COMMANDS = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
ALIGNCTL = [command for command in COMMANDS if command.startswith("alignctl")]


def modules_of(text: str) -> list[str]:
    """Files that a text names, from the root: one without a folder is in a folder that was named before it."""
    found: list[str] = []
    for name in re.findall(r"`([\w/]+\.py)`", text):
        folders = ["", "controller/", *sorted({f"{Path(path).parent}/" for path in found} - {"controller/"})]
        there = [folder + name for folder in folders if (ROOT / folder / name).is_file()]
        assert len(there) == 1, f"{name}: {there}"
        found += there
    return found


def test_the_way_to_the_first_pod_is_there_and_short() -> None:
    """Fifteen files, of which nobody visits both kinds of jobs; each is imported by one before it, or imports one."""
    [way] = re.findall(r"From `kubectl apply` to a phase's first pod.*?\n\n", TEXT, re.DOTALL)
    files = modules_of(way[: way.index("In the pod,")])
    assert len(files) == len(set(files)) <= 15
    names = {path: path.removesuffix(".py").replace("/", ".") for path in files}
    texts = {path: (ROOT / path).read_text() for path in files}

    def knows(one: str, other: str) -> bool:
        package, _, module = names[other].rpartition(".")
        imported = rf"from {names[other]} import|from {package} import [^\n]*\b{module}\b"
        return re.search(imported, texts[one]) is not None

    for i, path in enumerate(files[1:], 1):
        assert any(knows(path, other) or knows(other, path) for other in files[:i]), path


def call(command: str, cwd: Path, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["ALIGNMENT_METRICS_PORT"] = "0"
    arguments = shlex.split(command)
    return subprocess.run(
        arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.parametrize("command", [c for c in ALIGNCTL if c.split()[1] in ("validate", "plan")])
def test_commands_that_start_nothing_succeed(command):
    done = call(command, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", sorted({c.split()[1] for c in ALIGNCTL}))
def test_every_subcommand_has_help(command):
    assert call(f"alignctl {command} --help", ROOT).returncode == 0


@pytest.mark.slow
def test_kubectl_lines_do_what_they_say_on_a_real_cluster(runs: Runs):
    """In the order of the page. Only the sample's image and claim are those of the test."""
    kubectl = [command for command in COMMANDS if command.startswith("kubectl")]
    assert len(kubectl) > 8
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    config = runs.cluster.state / "readme.kubeconfig"
    config.write_text(runs.cluster.kubeconfig.read_text())
    runs.cluster.kubectl(
        "config", "set-context", "--current", f"--namespace={runs.namespace}", f"--kubeconfig={config}"
    )
    environment["KUBECONFIG"] = str(config)
    for command in kubectl:
        if "-k manifests/base" in command:
            continue  # the fixture has done it, with the image of this tree
        if "-f manifests/samples/minimal.yaml" in command:
            spec = yaml.safe_load((ROOT / "manifests/samples/minimal.yaml").read_text())["spec"]
            del spec["workspace"]
            runs.apply("minimal", spec)
            continue
        line = [str(runs.cluster.kubectl_binary), *shlex.split(command)[1:]]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=660, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(command):
    arguments = re.sub(r"TORCH_INDEX=<.*>", "TORCH_INDEX=x", command)
    assert call(f"{arguments} -n", ROOT).returncode == 0


def test_the_run_that_is_shown_is_valid():
    [text] = [block for block in blocks("yaml") if "kind: AlignmentRun" in block]
    [document] = parse_yaml(text)
    assert [phase.name for phase in load_run(document).spec.phases][-1] == "package"


def test_files_and_folders_that_are_named_exist():
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", TEXT) if not target.startswith("http")]
    paths = re.findall(r"`((?:controller|trainers|configs|manifests|docs|tests)/[\w/.-]+)`", TEXT)
    assert links
    assert paths
    for name in links + paths:
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_a_phase_on_its_own_over_two_processes(tmp_path):
    """The README's phase file and torchrun line, with a small model and data where they say."""
    from trainers.core.scratch import scratch_model
    from trainers.spec import ScratchModel

    [text] = [block for block in blocks("yaml") if "my-sft.yaml" in block]
    [command] = [command for command in COMMANDS if command.startswith("torchrun")]
    (tmp_path / "my-sft.yaml").write_text(text)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"prompt": "copy A B", "response": "A B"}\n' * 8)
    spec = {"hiddenSize": 16, "numLayers": 1, "tokenizer": {"trainOn": [{"files": "data/a.jsonl"}], "vocabSize": 300}}
    for part in scratch_model(ScratchModel.model_validate(spec), 0, tmp_path):
        part.save_pretrained(tmp_path / "my-model")
    done = call(command, tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / yaml.safe_load(text)["output"] / "result.json").exists()
