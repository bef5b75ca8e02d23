"""Command lines of run scripts, in the shapes in which projects around verl write them: read as the shell, Python and Hydra read them."""

import os
import shlex

import pytest

pytest.importorskip("verl")

from verl_heddle.verl_plugin import doctor as doctors
from verl_heddle.verl_plugin.command_line import read
from verl_heddle.verl_plugin.overrides import arguments_of, compose

NAME = "actor_rollout_ref.rollout.name=vllm"
FLAG = "+plugin=heddle"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of somebody's: its own mains, its own configuration on top of verl's."""
    import verl

    config = f"hydra:\n  searchpath:\n    - file://{os.path.dirname(verl.__file__)}/trainer/config\n"
    config += "defaults:\n  - ppo_trainer\n  - _self_\nactor_rollout_ref:\n  rollout:\n    name: vllm\n    n: 7\n"
    (tmp_path / "mine" / "config").mkdir(parents=True)
    (tmp_path / "mine" / "__init__.py").write_text("raise SystemExit('a command is read, not run')\n")
    (tmp_path / "mine" / "config" / "own.yaml").write_text(config)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "multiturn.yaml").write_text(config.replace("n: 7", "n: 9"))
    main = "import hydra\nfrom verl.trainer.main_ppo import TaskRunnerV1, run_ppo\n"
    main += (
        "@hydra.main(config_path='config', config_name='own', version_base=None)\ndef main(config):\n    run_ppo(config, TaskRunnerV1)\n"
    )
    (tmp_path / "mine" / "main.py").write_text(main)
    (tmp_path / "my_main.py").write_text("from verl.trainer.main_ppo import main\nimport my_rewards\nmain()\n")
    (tmp_path / "runner.py").write_text(main.replace("TaskRunnerV1", "TaskRunner"))
    (tmp_path / "opaque.py").write_text("import sys\nfrom launcher import go\ngo(sys.argv)\n")
    (tmp_path / "mine" / "config" / "run.sh").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


READ = {
    "stock": ("python3 -m verl.trainer.main_ppo {0}", 1),
    "variables, unbuffered": ("HYDRA_FULL_ERROR=1 CUDA_VISIBLE_DEVICES=0,1 python3 -u -m verl.trainer.main_ppo {0}", 1),
    "options of Python": ("/opt/venv/bin/python3.11 -W ignore -X dev -um verl.trainer.main_ppo {0}", 1),
    "configuration with =": ("python3 -m verl.trainer.main_ppo --config-path={project}/elsewhere --config-name=multiturn {0}", 9),
    "configuration with blanks": ("python3 -m verl.trainer.main_ppo --config-path {project}/elsewhere --config-name multiturn.yaml {0}", 9),
    "short options": ("python3 -m verl.trainer.main_ppo -cp {project}/elsewhere -cn multiturn {0}", 9),
    "another folder beside": ("python3 -m verl.trainer.main_ppo --config-dir elsewhere --config-name multiturn {0}", 9),
    "behind the overrides": ("python3 -m verl.trainer.main_ppo {0} --config-path={project}/elsewhere --config-name=multiturn", 9),
    "megatron": ("python3 -m verl.trainer.main_ppo --config-path=config --config-name=ppo_megatron_trainer.yaml {0}", 1),
    "ray job": (
        "RAY_ADDRESS=http://127.0.0.1:8265 ray job submit --no-wait --runtime-env=mine/env.yaml --working-dir . "
        "-- PYTHONUNBUFFERED=1 python3 -m mine.main {0}",
        7,
    ),
    "ray job, address with blank": ("ray job submit --address http://h:8265 --runtime-env mine/env.yaml -- python3 -m mine.main {0}", 7),
    "nohup, env": ("nohup env A=1 B='x y' python mine/main.py {0}", 7),
    "own main by file": ("python3 mine/main.py {0}", 7),
    "verl's main, imported": ("python my_main.py {0}", 1),
    "torchrun": ("torchrun --nproc_per_node 8 --nnodes=2 mine/main.py {0}", 7),
    "a debugger": ("python -m debugpy --listen 5678 --wait-for-client -m mine.main {0}", 7),
    "a shell": ("bash -lc 'cd x && A=1 python -m mine.main {0} 2>&1 | tee log.txt'", 7),
    "slurm": ("srun --nodes=1 -w node1 python -u mine/main.py {0}", 7),
    "overrides alone": ("{0}", 1),
}


@pytest.mark.parametrize("shape", READ)
def test_a_command_composes_what_its_program_would(shape, project):
    text, n = READ[shape]
    command = read(shlex.split(text.format(f"{NAME} {FLAG} data.train_batch_size=3", project=project)))
    assert command.overrides == (NAME, FLAG, "data.train_batch_size=3") and not command.unread
    config = compose(command.overrides, command)
    assert config.actor_rollout_ref.rollout.n == n and config.data.train_batch_size == 3 and "heddle" in config


def test_a_command_may_come_as_it_stands_in_a_script():
    text = f"# train\nexport A=1\nB=2 python3 -m verl.trainer.main_ppo \\\n  {NAME} \\\n  data.x='[1, 2]' \\ \n {FLAG} 2>&1 | tee x.log\n"
    command = read([text])
    assert command.overrides == (NAME, "data.x=[1, 2]", FLAG) and command.program == "verl.trainer.main_ppo"
    assert read(["python", "-m", "verl.trainer.main_ppo", "\\", NAME, " ", FLAG]).overrides == (NAME, FLAG)


def test_variables_before_the_program_are_its_environment(project):
    command = read(["A=1", "ray", "job", "submit", "--x=y", "--", "B=2=3", "env", "C=", "python", "mine/main.py", "d=4"])
    assert command.environment == {"A": "1", "B": "2=3", "C": ""} and command.overrides == ("d=4",)
    assert read(["a=1", "b.c=2"]).environment == {}, "overrides alone"
    (project / "lib" / "theirs").mkdir(parents=True)
    (project / "lib" / "theirs" / "main.py").write_text((project / "mine" / "main.py").read_text())
    assert read(["PYTHONPATH=lib", "python", "-m", "theirs.main"]).main.file == project / "lib" / "theirs" / "main.py"


def test_what_cannot_be_read_is_told(project):
    for words in ("bash run.sh", "./train a=1", "python -c x", "python", "python -m nowhere.to.be.found a=1", "python opaque.py a=1"):
        command = read(words.split())
        assert command.main is None and len(command.unread) == 1
        assert "not checked" in command.unread[0] or "nothing was checked" in command.unread[0]
    assert "TaskRunnerV1" in read(["python", "runner.py"]).unread[0]
    with pytest.raises(ValueError, match="unrecognized arguments: --nonsense"):
        read(["python", "mine/main.py", "a=1", "--nonsense"])


def test_arguments_of_a_command_line():
    command = ["python", "-W", "ignore", "-m", "verl.trainer.main_ppo", "a.b=1", "+plugin=heddle", "~c"]
    assert arguments_of(command) == ["a.b=1", "+plugin=heddle", "~c"]
    assert arguments_of(["a.b=1"]) == ["a.b=1"]


@pytest.fixture
def doctor(monkeypatch, capsys):
    """The doctor's word on a command line, without its look at the installation."""
    monkeypatch.setattr(doctors, "_versions", lambda: 0)
    monkeypatch.setattr(doctors, "_seams", lambda: 0)
    monkeypatch.setattr(doctors, "_quiet", lambda: None)

    def ask(text: str) -> tuple[int, str]:
        return doctors.doctor(shlex.split(text)), capsys.readouterr().out

    return ask


MAIN = f"python -m verl.trainer.main_ppo {NAME} trainer.default_local_dir=/tmp/heddle-test"


def test_doctor_never_says_ok_of_what_it_has_not_checked(doctor, project):
    for text, code in {
        f"{MAIN} {FLAG}": 0,
        MAIN: 0,
        f"python mine/main.py {FLAG}": 0,
        "bash run.sh": 2,
        f"python opaque.py {NAME} {FLAG}": 1,
        f"python runner.py --config-path=mine/config {FLAG}": 1,
        f"python -m nowhere.main {NAME} {FLAG}": 1,
    }.items():
        found, said = doctor(text)
        assert found == code, (text, said)
        assert ("\n  OK" in said) == (code == 0 and FLAG in text), said
        assert ("not checked" in said) == (code > 0), said


def test_doctor_sees_the_variables_of_the_command(doctor):
    code, said = doctor(f"VERL_USE_EXTERNAL_PLUGINS=none {MAIN} {FLAG}")
    assert code == 2 and "VERL_USE_EXTERNAL_PLUGINS=none" in said and "VERL_USE_EXTERNAL_PLUGINS" not in os.environ


def test_doctor_checks_the_jobs_of_a_sweep(doctor):
    code, said = doctor(f"{MAIN} {FLAG} data.seed=1,2 heddle.poll_interval_s=0.1,-1 -m")
    assert code == 2 and said.count("job ") == 4 and said.count("heddle.poll_interval_s must be") == 2
    assert "the other 2 jobs" in doctor(f"{MAIN} {FLAG} data.seed=range(1,11) --multirun")[1]


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("actor_rollout_ref.rollout.skip_rollout=true", "actor_rollout_ref.rollout.skip_rollout was removed in verl 0.8.0"),
        ("reward_model.strategy=fsdp", "reward_model.strategy was removed in verl 0.7.1"),
        ("ray_init.num_cpus=8", "ray_init was removed in verl 0.6.0; use ray_kwargs.ray_init instead"),
        ("trainer.nonsense=1", "Could not override 'trainer.nonsense'"),
    ],
)
def test_doctor_tells_what_stock_verl_refuses(override, word, doctor):
    code, said = doctor(f"{MAIN} {override} {FLAG}")
    assert code == 2 and "stock verl refuses this command" in said and word in said
    code, said = doctor(f"{MAIN} {FLAG} heddle.nonsense=1")
    assert code == 2 and "stock verl" not in said


def test_keys_that_are_gone_are_gone():
    from omegaconf import OmegaConf

    from verl_heddle.verl_plugin.doctor import GONE, MOVED

    configs = [compose([]), compose(["model_engine=megatron"])]
    keys = {key for keys in GONE.values() for key in keys.split()}
    there = [key for key in keys if any(OmegaConf.select(config, key) is not None for config in configs)]
    assert there == [] and set(MOVED) <= keys
    for instead in MOVED.values():
        name, _, last = instead.rpartition(".")
        assert last in (OmegaConf.select(configs[0], name) if name else configs[0]), instead
