"""What a test sets up around the program, by its own source: apart, it does not reach the program. A test
that fails after that has no verdict. The program's text plays no part, so it cannot ask for that.

In: the source of a test module. Out: (line, what) of the first such thing; line inf: there is none.

    python -c 'from sandbox.inside import surroundings; print(surroundings.first("open(f())"))'
"""
import ast
import builtins
import functools
import math
import random
import re

from .values import BASES

NAMES = {name: what for what, names in {  # names that a test uses: what they say of it
    "a mock": "patch Mock MagicMock AsyncMock mock_open create_autospec monkeypatch",
    "files": "open mkdtemp mkstemp NamedTemporaryFile TemporaryFile TemporaryDirectory write_text "
             "write_bytes mkdir makedirs chdir",
    "the environment": "environ putenv setenv",
    "the standard streams": "redirect_stdout redirect_stderr readouterr",
    "warnings or logs": "catch_warnings simplefilter filterwarnings assertWarns assertWarnsRegex warns "
                        "assertLogs assertNoLogs",
    "a decimal context": "getcontext setcontext localcontext",
    "limits of the interpreter": "setrecursionlimit set_int_max_str_digits setlocale settrace setprofile",
    "a function's cache": "cache_info cache_clear cache_parameters",
    "coroutines": "asyncio run_until_complete",
    "a function's source": "signature getsource getdoc get_type_hints iscoroutinefunction "
                           "isgeneratorfunction isgenerator __doc__ __annotations__ __code__ "
                           "__defaults__ __wrapped__ __closure__",
}.items() for name in names.split()}
SIGNS = {*NAMES, "seed", "isinstance", "issubclass", "import"}
PLAIN = {*vars(builtins), *(kind.__name__ for kind in BASES),
         *"Number Integral Real Iterator Iterable Sequence Callable ndarray".split()}
DRAWS = {*random.__all__} - {"seed"}


@functools.lru_cache(maxsize=1)
def first(source):
    if not SIGNS & set(re.findall(r"\w+", source)):  # most tests: there is nothing to look for
        return math.inf, ""
    nodes = [*ast.walk(ast.parse(source))]
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}
    own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names = NAMES.keys() - own
    found = [(node.lineno, NAMES[name_of(node)]) for node in nodes if name_of(node) in names]
    for node in nodes:
        if isinstance(node, ast.Call) and name_of(node.func) in ("isinstance", "issubclass") and node.args:
            kinds = getattr(node.args[-1], "elts", node.args[-1:])
            if not PLAIN.issuperset(map(name_of, kinds)):
                found.append((node.lineno, "isinstance() of what is not plain data"))
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if words(node.value) & imported:
                found.append((node.lineno, "what it imports"))
    return min(found + seeds(nodes), default=(math.inf, ""))


def name_of(node):
    """The name of a variable or an attribute."""
    return getattr(node, "id", getattr(node, "attr", ""))


def words(node):
    """All names in a node."""
    return {name_of(inner) for inner in ast.walk(node)} - {""}


def seeds(nodes):
    """The last seed, where the test draws nothing itself after it: it is meant for the program."""
    helpers = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name != "check"]
    draws = DRAWS | {node.name for node in helpers if words(node) & DRAWS}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    calls.sort(key=lambda node: (node.end_lineno, node.end_col_offset))
    seeds = [number for number, call in enumerate(calls) if name_of(call.func) == "seed"]
    if not seeds or any(words(call.func) & draws for call in calls[seeds[-1] + 1:]):
        return []
    return [(calls[seeds[-1]].lineno, "a seed")]
