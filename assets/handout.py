"""Coursework: write a copy of the project in which the bodies of some functions are missing.

    python assets/handout.py coursework dimum                 # one function
    python assets/handout.py coursework ddim_sample salun     # several
    python assets/handout.py --list                           # what can be taken out

In the copy a function keeps its signature and its docstring, and its body raises
NotImplementedError. Functions that are nearly the same (TWINS) lose their bodies, too, and README
loses the formulas. The tests then run once, for about two minutes: those of the missing functions
fail until a right body is there; others that need such a function are skipped until then.
"""
import argparse
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", "__pycache__", ".pytest_cache", ".venv", "runs", "data",
                                  "handout.py", "run.sh", "study.py")

# what can be taken out: the script, and where a student may look for the answer
FUNCTIONS = {
    "diffusion_loss": ("model.py", "DDPM, equation 14; add_noise and drop_labels are there to use"),
    "guided_output": ("model.py", "its docstring has the equation; can one batch do?"),
    "ddim_sample": ("model.py", "DDIM, equation 12 with sigma 0; split_output is there to use"),
    "leak": ("fid.py", "model.null is the label to draw; share counts"),
    "frechet_distance": ("fid.py", "its docstring has the equation; scipy has a matrix root"),
    "dimum": ("unlearn.py", "two diffusion losses and one descend"),
    "salun": ("unlearn.py", "through which of the two branches may a gradient flow?"),
    "saliency_mask": ("unlearn.py", "guided_gradients yields what is to be summed"),
    "fisher_mask": ("unlearn.py", "guided_gradients yields what is to be squared"),
    "ga": ("unlearn.py", "two diffusion losses and one descend"),
    "finetune": ("unlearn.py", "one diffusion loss and one descend"),
    "dimra": ("attack.py", "what data does the attacker hold?"),
    "inversion": ("attack.py", "which parameters may learn?"),
}

# functions whose bodies would give another one away
TWINS = {
    "dimum": ["ga"],
    "ga": ["dimum"],
    "saliency_mask": ["fisher_mask"],
    "dimra": ["finetune", "inversion"],
}

# names under which README speaks of a function
README_NAMES = {"dimum": "DiMUM", "dimra": "DiMRA"}

# goes into the copy's tests, below their imports
NEEDS = '''
def needs(*functions):
    """Skip a test while one of these functions (script.name) raises NotImplementedError."""
    missing = []
    for function in functions:
        script, name = function.split(".")
        source = inspect.getsource(getattr(sys.modules[script], name))
        if "raise NotImplementedError" in source:
            missing.append(name)
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")

'''

def with_twins(names):
    """The names, and the functions that would give them away."""
    found = list(names)
    for name in names:
        found += [twin for twin in TWINS.get(name, []) if twin not in found]
    return found

def function_node(source, name):
    """The syntax tree of a top-level function."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise LookupError(f"no function {name}")

def without_body(source, name, advice):
    """The source of a script, with the body of this function replaced by one line of advice."""
    node = function_node(source, name)
    lines = source.splitlines(keepends=True)
    docstring = node.body[0]
    # a generator must stay one: its caller iterates before it looks
    task = f'    raise NotImplementedError("write {name}: {advice}")\n'
    if any(isinstance(part, (ast.Yield, ast.YieldFrom)) for part in ast.walk(node)):
        task += "    yield\n"
    return "".join([*lines[:docstring.end_lineno], task, *lines[node.end_lineno:]])

def without_answers(readme, names):
    """README without its Python examples, and without the formulas of these functions."""
    readme = re.sub(r"```python\n.*?```\n", "*(left out in this copy)*\n", readme, flags=re.S)
    lines = readme.split("\n")
    for name in names:
        marks = f"`{name}`", f"**{README_NAMES.get(name)}**"
        for i, line in enumerate(lines):
            if line.startswith(("|", "-")) and any(mark in line for mark in marks):
                lines[i] = re.sub(r"\$[^$]+\$", "(your task)", line)
    return "\n".join(lines)

def write_copy(folder, names):
    """The project in a new folder, without the bodies of these functions."""
    shutil.copytree(PROJECT, folder, ignore=LEFT_OUT)
    for name in names:
        script, advice = FUNCTIONS[name]
        path = folder / script
        path.write_text(without_body(path.read_text("utf-8"), name, advice), "utf-8")
    path = folder / "README.md"
    path.write_text(without_answers(path.read_text("utf-8"), names), "utf-8")

def failing_tests(folder, expression=""):
    """The names of the tests that fail in the copy, of those that pytest's -k chooses."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
    if expression:
        command += ["-k", expression]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = re.findall(r"^(?:FAILED|ERROR) test_smoke\.py::(\w+)", done.stdout, re.M)
    return list(dict.fromkeys(found))

def skip_what_needs(folder, names, tests):
    """Mark these tests of the copy to be skipped until the functions are written."""
    path = folder / "test_smoke.py"
    source = path.read_text("utf-8")
    lines = source.splitlines(keepends=True)
    functions = [f'"{FUNCTIONS[name][0].removesuffix(".py")}.{name}"' for name in names]
    mark = f"@needs({', '.join(functions)})\n"
    firsts = []
    for test in tests:
        node = function_node(source, test)
        firsts.append(min([node.lineno, *(d.lineno for d in node.decorator_list)]))
    for first in sorted(firsts, reverse=True):
        lines.insert(first - 1, mark)
    source = "".join(lines)
    above = source.index("\nHERE = ")                  # below the imports
    source = source[:above] + NEEDS + source[above:]
    path.write_text(source.replace("import itertools\n", "import inspect\nimport itertools\n", 1),
                    "utf-8")

def write_handout(folder, names, expression=""):
    """The whole handout. Returns the tests that a student is to make pass."""
    names = with_twins(names)
    write_copy(folder, names)
    own = []
    others = []
    for test in failing_tests(folder, expression):
        is_own = any(test.startswith(f"test_{name}_") for name in names)
        (own if is_own else others).append(test)
    skip_what_needs(folder, names, others)
    return own

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of the copy; it must not exist")
    parser.add_argument("functions", nargs="*", help="what is to be written")
    parser.add_argument("--list", action="store_true", help="say what can be taken out, and stop")
    args = parser.parse_args()
    if args.list:
        for name, (script, advice) in FUNCTIONS.items():
            print(f"{name:18}{script:12}{advice}")
        return
    unknown = [name for name in args.functions if name not in FUNCTIONS]
    if unknown or not args.functions:
        parser.error(f"name functions from: {', '.join(FUNCTIONS)}")
    if args.folder.exists():
        parser.error(f"{args.folder} exists; name a new folder")
    own = write_handout(args.folder, args.functions)
    print(f"wrote {args.folder} without {', '.join(with_twins(args.functions))}; a right body makes "
          "these tests pass:")
    for test in own:
        print(f"  python -m pytest -q -k {test}")

if __name__ == "__main__":
    main()
