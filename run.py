#!/usr/bin/env python3
"""Set this project up and run it, with nothing but Python 3.10 or newer.

    python3 run.py demo [ARGS…]            fine-tune the embedded default model with forward passes only
    python3 run.py launch SCRIPT [ARGS…]   run a recipe through `accelerate launch`
    python3 run.py test [ARGS…]            run the tests, on up to four cores; ARGS go to pytest (-m slow, -n 0, -k NAME, …)
    python3 run.py serve [MODEL] [ARGS…]   start vLLM as the forward pass (docs/guides/serving.md); ARGS go to `vllm serve`
    python3 run.py gpu [ARGS…]             run on a GPU what needs one: tests, kernel counts, benchmarks and the demo
    python3 run.py check                   ruff check, ruff format --check, mypy
    python3 run.py docs [--serve]          build the documentation into site/; --serve shows it and follows changes
    python3 run.py install [EXTRA…]        only install, with these extras of pyproject.toml

The first run makes a virtual environment in .venv beside this file and installs the package there,
editable, in the versions of constraints.txt. Later runs find that done and start at once.

`demo` is `launch recipes/opt_sst2.py --offline --config recipes/last_norm.yaml`; a file name in ARGS is relative to where you are.
`serve` installs vLLM into an environment of its own, .venv-vllm. MODEL is a folder or a name on the hub.

Environment:
    ZO_HF_VENV           another folder for the virtual environment
    ZO_HF_VLLM_VENV      another folder for that of `serve`
    ZO_HF_SYSTEM_TORCH   set to 1: use the torch that this Python already has (container images, clusters)
    OMP_NUM_THREADS      CPU threads of a process that `launch` starts (default: what torch would take)
    PIP_…                as pip reads it. On Linux the usual torch is the CUDA build, several GB with what it
                         needs: to take another one, point PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS at it.
"""

# Standard library only, and no syntax newer than Python 3.6, so that an old Python gets as far as the message.
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

MIN_PYTHON = (3, 10)
ROOT = os.path.dirname(os.path.abspath(__file__))
RECIPE = os.path.join("recipes", "opt_sst2.py")
DEMO_SETTINGS = os.path.join("recipes", "last_norm.yaml")
STAMP = "zo_hf-install.json"
VLLM_STAMP = "zo_hf-vllm.json"
EXTRAS = {
    "demo": ["demo", "peft"],
    "launch": ["demo", "peft"],
    "test": ["demo", "peft", "test"],
    "check": ["dev"],
    "docs": ["docs"],
}


class Failure(Exception):
    """A message for the person at the terminal."""


def say(text):
    print("run.py: " + text, file=sys.stderr, flush=True)


def check_python():
    if sys.version_info >= MIN_PYTHON:
        return
    found = [name for name in (f"python3.{minor}" for minor in range(14, 9, -1)) if shutil.which(name)]
    hint = f"Run it with a newer one: {found[0]} run.py" if found else "Install a newer Python"
    raise Failure(
        "Python {}.{} or newer is needed, this is {} ({}). {}.".format(
            *MIN_PYTHON, sys.version.split()[0], sys.executable, hint
        )
    )


# --- the virtual environment ------------------------------------------------------------------------------------------


def venv_dir():
    return os.path.abspath(os.path.expanduser(os.environ.get("ZO_HF_VENV") or os.path.join(ROOT, ".venv")))


def bin_dir(venv):
    return os.path.join(venv, "Scripts" if os.name == "nt" else "bin")


def venv_python(venv):
    return os.path.join(bin_dir(venv), "python.exe" if os.name == "nt" else "python")


def use_system_torch():
    return os.environ.get("ZO_HF_SYSTEM_TORCH", "").lower() not in ("", "0", "false", "no")


def fingerprint():
    """What an installation depends on, other than its extras."""
    parts = [ROOT, "{}.{}".format(*sys.version_info[:2]), str(use_system_torch())]
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            parts.append(file.read())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def installed_extras(venv):
    """The extras of a complete and current installation, or None."""
    try:
        with open(os.path.join(venv, STAMP), encoding="utf-8") as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return None
    if stamp.get("fingerprint") != fingerprint() or not os.path.exists(venv_python(venv)):
        return None
    return set(stamp.get("extras", []))


def clean_environment(venv=None):
    venv = venv or venv_dir()
    env = dict(os.environ)
    # These would send packages, or Python itself, elsewhere than the virtual environment.
    for name in ("PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX"):
        env.pop(name, None)
    env["PATH"] = bin_dir(venv) + os.pathsep + env.get("PATH", os.defpath)
    env["VIRTUAL_ENV"] = venv
    return env


def create_venv(venv, variable="ZO_HF_VENV", flags=(), anew=False):
    works = False
    if not anew and os.path.exists(venv_python(venv)):
        query = "import sys; print('{}.{}'.format(*sys.version_info[:2])); import pip"
        try:
            reply = subprocess.run(
                [venv_python(venv), "-c", query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
            )
            works = reply.returncode == 0 and reply.stdout.decode().strip() == "{}.{}".format(*sys.version_info[:2])
        except OSError:
            pass  # the Python that it was made with is gone
    if works:
        return
    if os.path.isdir(venv) and os.listdir(venv) and not os.path.exists(os.path.join(venv, "pyvenv.cfg")):
        raise Failure(f"{venv} has files in it but is no virtual environment. Set {variable} to another folder.")
    try:
        import ensurepip  # noqa: F401
        import venv as _  # noqa: F401
    except ImportError:
        raise Failure(
            "this Python cannot make virtual environments: its module venv or ensurepip is missing. "
            "On Debian and Ubuntu: sudo apt install python{}.{}-venv".format(*sys.version_info[:2])
        ) from None
    say("making a virtual environment in " + venv)
    code = subprocess.run([sys.executable, "-m", "venv", "--clear", *flags, venv], check=False).returncode
    if code:
        raise Failure(
            f"no virtual environment could be made in {venv} (exit code {code}, see above). Is there room on the disk, "
            f"and may you write there? {variable} chooses another folder."
        )


def constraints_file(folder):
    """constraints.txt, or with ZO_HF_SYSTEM_TORCH a copy that holds torch at the very build that is there."""
    path = os.path.join(ROOT, "constraints.txt")
    if not use_system_torch():
        return path
    from importlib.metadata import PackageNotFoundError, version

    try:
        torch = version("torch")
    except PackageNotFoundError:
        raise Failure(
            f"ZO_HF_SYSTEM_TORCH is set, but {sys.executable} has no torch. Unset it, or run this with the Python that has one."
        ) from None
    say(f"using torch {torch} of {sys.executable}")
    with open(path, encoding="utf-8") as file:
        lines = [line for line in file if not line.startswith("torch==")]
    copy = os.path.join(folder, "constraints.txt")
    with open(copy, "w", encoding="utf-8") as file:
        file.writelines([*lines, f"torch=={torch}\n"])
    return copy


def pip(venv, command):
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    return [venv_python(venv), "-m", "pip", "--disable-pip-version-check", command, "--no-input", *quiet]


def install(extras):
    venv = venv_dir()
    present = installed_extras(venv)
    if present is not None and present >= set(extras):
        return
    create_venv(venv, flags=["--system-site-packages"] if use_system_torch() else [])
    # What was asked for before stays, so that `check` after `test` does not take anything away.
    extras = sorted(set(extras) | (present or set()))
    stamp = os.path.join(venv, STAMP)
    if os.path.exists(stamp):
        os.remove(stamp)
    say("installing zo_hf{} into {}; this takes minutes the first time".format("[" + ",".join(extras) + "]", venv))
    with tempfile.TemporaryDirectory() as folder:
        command = pip(venv, "install")
        target = ROOT + ("[" + ",".join(extras) + "]" if extras else "")
        command += ["-c", constraints_file(folder), "-e", target]
        code = subprocess.run(command, env=clean_environment(), check=False).returncode
    if code:
        raise Failure(
            f"pip could not install the package (exit code {code}, its reason is above). Without a network, or behind a "
            "proxy or mirror, tell pip so (PIP_PROXY, PIP_INDEX_URL); if a pinned version is not to be had for this "
            "Python, install without them: pip install -e '.[demo]'"
        )
    with open(stamp, "w", encoding="utf-8") as file:
        json.dump({"fingerprint": fingerprint(), "extras": extras}, file)


# --- the commands -----------------------------------------------------------------------------------------------------


def become(command, cwd=None, env=None):
    """Run the command in place of this process, so that signals reach it; never returns on POSIX."""
    env = env or clean_environment()
    if cwd:
        os.chdir(cwd)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execve(command[0], command, env)
    return subprocess.run(command, env=env, check=False).returncode


def launch_flags(python):
    """Flags that keep `accelerate launch` from guessing, unless the user configured it or the environment says more."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    names = ("default_config.yaml", "default_config.yml", "default_config.json")
    if any(os.path.exists(os.path.join(os.path.expanduser(home), "accelerate", name)) for name in names):
        return []  # the user ran `accelerate config`
    query = (
        "import torch; a = getattr(torch, 'accelerator', None); "
        "print(a.device_count() if a and a.is_available() else 0, torch.get_num_threads())"
    )
    reply = subprocess.run(
        [python, "-c", query], stdout=subprocess.PIPE, env=clean_environment(), check=False, text=True
    )
    if reply.returncode:
        raise Failure(f"torch cannot be imported (see above). Remove {venv_dir()} and run this again.")
    devices, threads = (int(word) for word in reply.stdout.split()[-2:])
    flags = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if devices > 1:
        return ["--multi_gpu", "--num_processes", str(devices), *flags]
    # accelerate starts a process with a single CPU thread unless told otherwise.
    return ["--num_processes", "1", "--num_cpu_threads_per_process", str(threads), *flags]


def launch(arguments):
    if not arguments:
        raise Failure(f"launch needs a script: python3 run.py launch {RECIPE} --help")
    script, *arguments = arguments
    candidates = [os.path.abspath(script), os.path.join(ROOT, script)]
    found = [path for path in candidates if os.path.isfile(path)]
    if not found:
        raise Failure("there is no file {}".format(" or ".join(dict.fromkeys(candidates))))
    install(extras_of(found[0]))
    python = venv_python(venv_dir())
    # --quiet: when the script fails, its own traceback is enough
    module = [python, "-m", "accelerate.commands.launch", "--quiet"]
    return become([*module, *launch_flags(python), found[0], *arguments])


def extras_of(script):
    """What a script's own header asks of this package, else what most need."""
    with open(script, encoding="utf-8") as file:
        header = re.search(r"^# dependencies = .*zo-hf\[([a-z,]+)\]", file.read(), re.MULTILINE)
    return sorted({*EXTRAS["launch"], *(header.group(1).split(",") if header else [])})


def demo(arguments):
    has_settings = any(word == "--config" or word.startswith("--config=") for word in arguments)
    settings = [] if has_settings else ["--config", os.path.join(ROOT, DEMO_SETTINGS)]
    return launch([os.path.join(ROOT, RECIPE), "--offline", *settings, *arguments])


def gpu(arguments):
    script = os.path.join(ROOT, "recipes", "first_gpu_hour.py")
    install(extras_of(script))
    return become([venv_python(venv_dir()), script, *arguments])


def test(arguments):
    install(EXTRAS["test"])
    if not any(word.startswith("-n") or word == "--collect-only" for word in arguments):
        # A file's tests stay in one process, so that what they share is computed once.
        arguments = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile", *arguments]
    return become([venv_python(venv_dir()), "-m", "pytest", *arguments], cwd=ROOT)


def check(arguments):
    if arguments:
        raise Failure("check takes no arguments")
    install(EXTRAS["check"])
    failed = []
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        say(" ".join(command))
        code = subprocess.run(
            [venv_python(venv_dir()), "-m", *command], cwd=ROOT, env=clean_environment(), check=False
        ).returncode
        if code:
            failed.append(" ".join(command))
    if failed:
        say("failed: " + "; ".join(failed))
    return 1 if failed else 0


def docs(arguments):
    if arguments not in ([], ["--serve"]):
        raise Failure("docs takes no arguments other than --serve")
    install(EXTRAS["docs"])
    # Any link, anchor or reference that leads nowhere is an error.
    mkdocs = [venv_python(venv_dir()), "-m", "mkdocs", *(["serve"] if arguments else ["build", "--strict", "--clean"])]
    os.environ["NO_MKDOCS_2_WARNING"] = "1"  # the theme's notice about a tool that is not used here
    if not arguments:
        say("building the site; open " + os.path.join(ROOT, "site", "index.html"))
        mkdocs.append("--quiet")
    return become(mkdocs, cwd=ROOT)


# --- the serving engine -----------------------------------------------------------------------------------------------


def vllm_dir():
    return os.path.abspath(os.path.expanduser(os.environ.get("ZO_HF_VLLM_VENV") or os.path.join(ROOT, ".venv-vllm")))


def serve(arguments):
    if any(word in ("-h", "--help") for word in arguments):
        print(__doc__)
        return 0
    sys.path.insert(0, os.path.join(ROOT, "recipes"))
    from common import vllm_server

    try:
        request = vllm_server.requested(arguments)
        vllm_server.refuse_what_cannot_start(request)
    except vllm_server.Refused as refused:
        raise Failure(str(refused)) from None
    venv, has_cuda = vllm_dir(), vllm_server.cuda_devices() > 0
    install_vllm(venv, has_cuda, vllm_server)
    words, variables = vllm_server.command(request, request.model or embedded_model(), has_cuda)
    say(f"starting vLLM {vllm_server.VERSION} at {request.url}; this takes a minute or more")
    vllm_server.when_ready(request.url, lambda: say(vllm_server.how_to_use(request)))
    return become([venv_python(venv), *words], env={**variables, **clean_environment(venv)})


def install_vllm(venv, has_cuda, vllm_server):
    """Install vLLM into an environment of its own, once: it wants other versions than this package."""
    requirement = vllm_server.requirement(has_cuda)
    wanted = {"requirement": requirement, "python": "{}.{}".format(*sys.version_info[:2]), "venv": venv}
    stamp = os.path.join(venv, VLLM_STAMP)
    try:
        with open(stamp, encoding="utf-8") as file:
            if json.load(file) == wanted and os.path.exists(venv_python(venv)):
                return
    except (OSError, ValueError):
        if os.path.isdir(venv) and os.listdir(venv) and not os.path.exists(stamp):
            raise Failure(
                f"{venv} has files in it that `serve` did not put there. Remove it, or set ZO_HF_VLLM_VENV to another folder."
            ) from None
    # Builds share files, so none goes on top of another one, nor of half of itself.
    create_venv(venv, "ZO_HF_VLLM_VENV", anew=True)
    with open(stamp, "w", encoding="utf-8") as file:
        json.dump({}, file)
    say(f"installing {requirement} into {venv}; this takes minutes, once")
    command, env = [*pip(venv, "install"), requirement], clean_environment(venv)
    code = subprocess.run(command, env=env, check=False).returncode
    if code and not has_cuda:
        say("trying again with PyTorch's index, for torch's build for CPUs")
        command += ["--extra-index-url", vllm_server.TORCH_FOR_CPUS]
        code = subprocess.run(command, env=env, check=False).returncode
    if code:
        raise Failure(
            f"pip could not install {requirement} (exit code {code}, its reason is above). Without a network, or behind a "
            "proxy or mirror, tell pip so (PIP_PROXY, PIP_INDEX_URL)."
        )
    if not has_cuda:
        subprocess.run([*pip(venv, "uninstall"), "-y", *vllm_server.UNWANTED_ON_CPUS], env=env, check=True)
        vllm_server.name_it_vllm(os.path.join(venv, "lib", "python" + wanted["python"], "site-packages"))
    with open(stamp, "w", encoding="utf-8") as file:
        json.dump(wanted, file)


def embedded_model():
    """Return the folder of the embedded default model, after fetching it where it is missing."""
    install(EXTRAS["launch"])
    query = "from zo_hf.tasks.assets import default_model; print(default_model())"
    reply = subprocess.run(
        [venv_python(venv_dir()), "-c", query], stdout=subprocess.PIPE, env=clean_environment(), check=False, text=True
    )
    if reply.returncode:
        raise Failure("the embedded default model is not to be had (see above); give one: python3 run.py serve MODEL")
    return reply.stdout.splitlines()[-1]


def main(arguments):
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0 if arguments else 2
    command, *rest = arguments
    commands = {
        "demo": demo,
        "launch": launch,
        "serve": serve,
        "gpu": gpu,
        "test": test,
        "check": check,
        "docs": docs,
        "install": install,
    }
    try:
        if command not in commands:
            raise Failure("there is no command {!r}; it is one of {}".format(command, ", ".join(commands)))
        check_python()
        return commands[command](rest) or 0
    except Failure as failure:
        say(str(failure))
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
