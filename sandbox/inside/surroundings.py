"""What a test sets up around the program, by its own source: apart, it does not reach the program. A test
that fails after that has no verdict. The program's text plays no part, so it cannot ask for that.

In: the source of a test module, and the names by which it calls the program. Out: (line, what) of the first
such thing, or None.

    python -c 'from sandbox.inside import surroundings; print(surroundings.first("open(f())", "f"))'
"""
import ast
import builtins
import functools
import re

CALLED = {name: what for what, names in {  # functions and methods that a test calls: what they say of it
    "a mock": "patch Mock MagicMock AsyncMock mock_open create_autospec monkeypatch",
    "files": "open mkdtemp mkstemp NamedTemporaryFile TemporaryFile TemporaryDirectory write_text "
             "write_bytes mkdir makedirs chdir",
    "the environment": "environ putenv setenv",
    "the standard streams": "redirect_stdout redirect_stderr readouterr",
    "warnings or logs": "catch_warnings simplefilter filterwarnings assertWarns assertWarnsRegex warns "
                        "assertLogs assertNoLogs",
    "a decimal context": "getcontext setcontext localcontext",
    "limits of the interpreter": "setrecursionlimit set_int_max_str_digits setlocale settrace setprofile",
    "a generator's methods": "send throw close",
    "a function's cache": "cache_info cache_clear cache_parameters",
    "coroutines": "asyncio run_until_complete",
    "a function's source": "signature getsource getdoc get_type_hints iscoroutinefunction "
                           "isgeneratorfunction",
}.items() for name in names.split()}
OF_FUNCTIONS = {"__doc__", "__annotations__", "__code__", "__defaults__", "__wrapped__", "__closure__"}
SIGNS = {*CALLED, *OF_FUNCTIONS, "seed", "isinstance", "issubclass", "import", "with", "await"}


@functools.lru_cache(maxsize=1)
def first(source, names):
    """`names`: separated by spaces."""
    if not SIGNS & set(re.findall(r"\w+", source)):  # most tests: there is nothing to look for
        return None
    tree, names = ast.parse(source), set(names.split())
    imported = {(alias.asname or alias.name).partition(".")[0] for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    found = [(node.lineno, what) for node in ast.walk(tree) if (what := sets_up(node, names, imported, own))]
    return min(found + seeds(tree), default=None)


def sets_up(node, names, imported, own):
    """What a node does that cannot reach the program, in words, or None."""
    if isinstance(node, ast.Call):
        if getattr(node.func, "id", "") in ("isinstance", "issubclass") and len(node.args) == 2:
            known = imported | set(vars(builtins))
            return None if words(node.args[1]) & known else "isinstance() of a class of its own"
        called = words(node.func)
        return next((CALLED[word] for word in sorted(called) if word in CALLED and not called & own), None)
    if isinstance(node, ast.Await):
        return "coroutines"
    if isinstance(node, ast.Attribute) and node.attr in OF_FUNCTIONS:
        return "a function's source"
    if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
        return "what it imports" if words(node.value) & imported else None
    if isinstance(node, ast.With):
        calls = [inner for item in node.items for inner in ast.walk(item.context_expr)
                 if isinstance(inner, ast.Call)]
        return "the program in a `with`" if any(words(call.func) & names for call in calls) else None
    return None


def words(node):
    """All names in a node."""
    return {getattr(inner, "id", getattr(inner, "attr", "")) for inner in ast.walk(node)}


def seeds(tree):
    """Seeds after which the test draws nothing itself: they are meant for the program."""
    draws = {"random"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            draws |= {alias.asname or alias.name for alias in node.names}
    draws |= {node.name for node in ast.walk(tree)
              if isinstance(node, ast.FunctionDef) and node.name != "check" and words(node) & draws}
    draws.discard("seed")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found, last = [], None
    for call in sorted(calls, key=lambda node: (node.end_lineno, node.end_col_offset)):
        if "seed" in words(call.func):
            last = call.lineno, "a seed"
            found.append(last)
        elif last in found and words(call.func) & draws:
            found.remove(last)
    return found
