"""Tools for real mathematics: `calculate`, `solve` (SymPy) and `python`. For data sets from the hub and models of a billion parameters.

verl loads this file by path where run.sh is given DATA=gsm8k or dapo. Calculating is done here, by a walk over the syntax tree; whatever
could loop, fill memory or reach files, SymPy's parser included, runs in the sandbox (`HEDDLE_SANDBOX`: auto, a level, or a server's URL).
"""

import ast
import asyncio
import functools
import json
import operator
import os
import sys
from fractions import Fraction
from pathlib import Path

from verl.tools.function_tool import function_tool

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.sandbox.limits import Limits, Result
from recipes.sandbox.local import Sandbox
from recipes.sandbox.remote import RemoteSandbox, connect

LIMITS = Limits(wall_s=20, cpu_s=20, address_mb=2048, memory_mb=1024, output_kb=64)
"""SymPy alone takes 0.5 s and 60 MiB to import, NumPy a large address space."""
MAX_CHARS = 4000
MAX_BITS = 4096
"""Of a number met on the way: 1200 digits are more than anyone reads, and fast."""

OPERATORS = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos},
}

SOLVE = r"""
import json, sys
from sympy import Eq, Symbol, simplify, solve
from sympy.parsing.sympy_parser import convert_xor, implicit_multiplication_application, parse_expr, standard_transformations
rules = standard_transformations + (implicit_multiplication_application, convert_xor)
job = json.load(sys.stdin)
parts, depth = [""], 0
for letter in job["equations"]:
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and not depth:
        parts.append("")
    else:
        parts[-1] += letter
try:
    sides = [[parse_expr(side, transformations=rules) for side in part.split("=")] for part in parts]
    if any(len(part) > 2 for part in sides):
        raise ValueError("one = per equation")
    if not any(len(part) == 2 for part in sides) and not job["unknowns"]:
        print(", ".join(str(simplify(part[0])) for part in sides))
    else:
        unknowns = [Symbol(name.strip()) for name in job["unknowns"].split(",") if name.strip()]
        equations = [part[0] - part[1] if len(part) == 2 else part[0] for part in sides]
        print(solve(equations, *unknowns, dict=True))
except Exception as error:
    print(f"error: {type(error).__name__}: {error}")
"""


@functools.cache
def sandbox() -> Sandbox | RemoteSandbox:
    """One per process. Raises as `recipes.sandbox.remote.connect`."""
    return connect(os.environ.get("HEDDLE_SANDBOX") or "auto", LIMITS, packages=True)


async def _run(code: str, stdin: str = "") -> Result:
    pool = await asyncio.to_thread(sandbox)  # the first call tries what works here
    return await pool.arun({"main.py": code}, stdin=stdin)


def _text(result: Result) -> str:
    """What a model reads of a run."""
    text = result.stdout.strip()[:MAX_CHARS]
    return text if result.ok else f"{text}\nerror: {result.explain()}".strip()


def evaluate(expression: str) -> str:
    """The value of an arithmetic expression: exact where it is rational. Anything else is a text that starts with "error:"."""
    try:
        value = _value(ast.parse(expression.strip().replace("^", "**").replace(",", ""), mode="eval").body)
        return str(float(value)) if isinstance(value, float) else str(value)
    except (ValueError, TypeError, SyntaxError, ArithmeticError, RecursionError, MemoryError, AttributeError) as error:
        return f"error: {error}"


def _value(node: ast.expr) -> Fraction | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return Fraction(str(value))
        case ast.UnaryOp():
            return OPERATORS[type(node.op)](_value(node.operand)) if type(node.op) in OPERATORS else _refuse(node.op)
        case ast.BinOp(op=ast.Pow()):
            base, power = _value(node.left), _value(node.right)
            if isinstance(base, Fraction) and abs(power) * max(base.numerator.bit_length(), base.denominator.bit_length()) > MAX_BITS:
                raise ValueError("the number is too large")
            result = base**power
        case ast.BinOp():
            result = OPERATORS[type(node.op)](_value(node.left), _value(node.right)) if type(node.op) in OPERATORS else _refuse(node.op)
        case _:
            _refuse(node)
    if isinstance(result, complex):
        raise ValueError("the result is not a real number")
    if isinstance(result, Fraction) and max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
        raise ValueError("the number is too large")
    return result


def _refuse(node: ast.AST) -> float:
    raise ValueError(f"only numbers and + - * / // % ** ( ) are allowed, not {type(node).__name__}")


@function_tool
async def calculate(expression: str) -> str:
    """Calculate exactly, for example (3+4)*5/2.

    Args:
        expression: numbers and + - * / // % ** ( )
    """
    return evaluate(expression) if isinstance(expression, str) else "error: expression must be text"


@function_tool
async def solve(equations: str, unknowns: str = "") -> str:
    """Solve equations with SymPy, or simplify an expression without =.

    Args:
        equations: such as x**2-5*x+6=0, or several separated by commas
        unknowns: such as x, or x,y; empty for all
    """
    if not isinstance(equations, str) or not isinstance(unknowns, str):
        return "error: equations and unknowns must be text"
    return _text(await _run(SOLVE, json.dumps({"equations": equations, "unknowns": unknowns})))


@function_tool
async def python(code: str) -> str:
    """Run a Python program and return what it prints. SymPy is installed; there are no files and no network.

    Args:
        code: the program
    """
    if not isinstance(code, str):
        return "error: code must be text"
    return _text(await _run(code)) or "(no output: print what you want to see)"
