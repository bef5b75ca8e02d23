"""The math recipe for real problems, offline: answers, rows of the hub, calculator, solver and Python in the sandbox."""

import asyncio
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.tools.function_tool import load_function_tools_from_path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.math import answers, hub, prepare, reward

unhurried = settings(deadline=None)  # on a busy machine a single example can take long

ANSWERS = {
    "the box \\boxed{3}": "3",
    "\\boxed{1} then \\boxed{\\frac{1}{2}}": "\\frac{1}{2}",
    "#### 1,234": "1,234",
    "Answer: 7.": "7",
    "the answer is $x+1$": "x+1",
    "\\boxed{1}<tool_response>\\boxed{2}</tool_response>": None,
    "\\boxed{never closed": None,
    "nothing": None,
}


@pytest.mark.parametrize("text", ANSWERS)
def test_the_final_answer_is_found(text):
    assert answers.final_answer(text) == ANSWERS[text]


SAME = [
    ("3", "3.0"),
    ("1,234", "1234"),
    ("\\frac{3}{4}", "0.75"),
    ("-1/2", "-0.5"),
    ("5\\text{ cm}", "5"),
    ("$7$", "7"),
    ("\\dfrac12", "\\frac12"),
]


@pytest.mark.parametrize("pair", SAME)
def test_numbers_are_compared_as_numbers(pair):
    assert answers.same(*pair) and answers.same(*pair[::-1]) and not answers.same(pair[0], "8")


@unhurried
@given(st.text(alphabet="\\{}box0123.,/-$ fractANSWERaiswer:#\n"), st.text(alphabet="0123./-x"))
def test_comparing_takes_any_text(solution, truth):
    found = answers.final_answer(solution)
    assert found is None or isinstance(answers.same(found, truth), bool)


def test_answers_of_hub_data_are_graded(monkeypatch):
    grade = lambda text, truth: reward.compute_score("gsm8k", text, truth, {"index": 0})  # noqa: E731
    assert grade("so \\boxed{72}", "72") == 1.0 and grade("so \\boxed{71}", "72") == 0.0 and grade("72", "72") == 0.0
    assert grade("\\boxed{(x+1)^2}", "x^2+2x+1") == 1.0, "math-verify knows algebra"
    monkeypatch.setattr(answers, "find_spec", lambda name: None)
    assert grade("\\boxed{(x+1)^2}", "x^2+2x+1") == 0.0 and grade("\\boxed{x + 1}", "x+1") == 1.0, "without it, equal texts"


def test_rows_of_the_hub_are_converted():
    row = {"question": "How many?", "answer": "Natalia sold 48/2 = 24.\n#### 1,072"}
    made = hub.from_gsm8k(row, 3)
    assert (
        made["reward_model"]["ground_truth"] == "1072"
        and made["prompt"][0]["content"].endswith("How many?")
        and made["data_source"] in hub.SETS
    )
    text = 'Solve it. The last line ... on its own line.\n\nWhat is 1+1?\n\nRemember to put your answer on its own line after "Answer:".'
    convert = hub.from_dapo()
    dapo = {"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": "2"}}
    first = convert(dapo, 0)
    assert first["prompt"][0]["content"] == hub.ASK + "What is 1+1?" and convert(dapo, 1) is None, "each problem once"


def test_a_hub_out_of_reach_is_said_plainly(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit):
        prepare.main(["--out", str(tmp_path), "--data", "gsm8k"])
    assert "HF_HUB_OFFLINE is set: unset it, or use --data generated" in capsys.readouterr().err and not any(tmp_path.iterdir())


SOLVER = {tool.name: tool for tool in load_function_tools_from_path(str(Path(prepare.__file__).with_name("solver.py")))}
CALCULATED = {
    "1+2*3": "7",
    "(3+4)*5/2": "35/2",
    "0.1+0.2": "3/10",
    "2^10": "1024",
    "7//2": "3",
    "1,000*2": "2000",
    "2**0.5": "1.4142135623730951",
}
REFUSED = ["", "x+1", "9**9**9", "1/0", "__import__('os')", "'a'*9", "(-1)**0.5", "1<2", "9" * 2000 + "**9", "(" * 5000, "True+1"]


@pytest.mark.parametrize("expression", [*CALCULATED, *REFUSED])
async def test_the_calculator_is_exact_and_safe(expression):
    result = await SOLVER["calculate"].call({"expression": expression})
    assert result == CALCULATED.get(expression, result) and (result.startswith("error:") == (expression in REFUSED))


async def test_the_solver_and_python_work_in_the_sandbox(monkeypatch):
    """Needs SymPy inside: in this environment's Python where bubblewrap works, else in the system's."""
    monkeypatch.setenv("HEDDLE_TEST_SECRET", "escaped")  # SymPy's parser evaluates what it reads: only the walls hold
    module = sys.modules[SOLVER["solve"].fn.__module__]
    result = module.sandbox().run({"main.py": "import sympy"})
    assert result.ok, f"no SymPy for the sandbox's Python: {result.explain()}; bubblewrap gives it this environment's"
    results = await asyncio.gather(
        SOLVER["solve"].call({"equations": "x^2-5x+6=0", "unknowns": "x"}),
        SOLVER["solve"].call({"equations": "x+y=3, x-y=1", "unknowns": "x,y"}),
        SOLVER["solve"].call({"equations": "(x+1)**2-x**2"}),
        SOLVER["solve"].call({"equations": "__import__('os').popen('env').read()"}),
        SOLVER["python"].call({"code": "import sympy\nprint(sympy.factorint(360))"}),
        SOLVER["python"].call({"code": "open('/etc/passwd')"}),
    )
    assert results[:3] == ["[{x: 2}, {x: 3}]", "[{x: 2, y: 1}]", "2*x + 1"]
    assert "escaped" not in results[3] and results[4] == "{2: 3, 3: 2, 5: 1}" and "error:" in results[5]
