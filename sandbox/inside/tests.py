"""The tests of a row as the sandbox counts them: which statements of `check` make one test, and
what can fail.

In: the source of a test module. Out: code in which each test is a block `with __judge__.test():`,
and their number. Run by the judge only: no program is near.

    python -c 'from sandbox.inside.tests import Tests; print(Tests("assert f(1) == 2", "f").total)'
"""
import ast

from .values import is_builtin

IMPORTS = ast.Import, ast.ImportFrom
DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
# Functions and methods whose call tests nothing, even of a value of the candidate
HARMLESS = "print append add extend insert update sort reverse setdefault appendleft push".split()


class Tests:
    """The tests of a row: `code` of a module whose `check` reports each of them, and their `total`.

    A test is a run of statements of `check` that ends with one that can fail: an assert, a raise, a
    helper that is given something of the candidate, or a loop, an `if`, a `with` or a `try` with
    such a thing inside. `assert True` tests nothing. A test passes if all its statements complete.
    A source without `check` is the body of one.
    """

    def __init__(self, source, entry_point):
        tree = WithoutMessages().visit(ast.parse(source))
        imports = ast.Module([node for node in tree.body if isinstance(node, IMPORTS)], [])
        self.imports = compile(imports, "<test>", "exec", dont_inherit=True)
        names = ("id", "attr", "name")  # of variables, of attributes, of what is imported
        self.names = {getattr(node, name, "") for node in ast.walk(tree) for name in names}
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
        check = found[-1] if found else self.wrap(tree)
        self.check = check.name
        tree.body = [node for node in tree.body if not calls_check(node)]
        arguments = check.args.posonlyargs + check.args.args
        needed = len(arguments) - len(check.args.defaults) + check.args.kw_defaults.count(None)
        generates = any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in ast.walk(check))
        if needed > 1 or not arguments or generates:
            raise ValueError("check must be a plain function of one argument")
        self.candidates = {arguments[0].arg, entry_point}
        self.marked = self.candidates | {entry_point.partition("(")[0].partition(".")[0]}
        for node in tree.body:
            if node is not check:
                self.mark(node)
        groups = self.split(check.body)
        self.total = len(groups)
        check.body = [self.reported(group) for group in groups]
        self.undefined = undefined(tree)
        self.code = compile(ast.fix_missing_locations(tree), "<test>", "exec", dont_inherit=True)

    def wrap(self, tree):
        """Make a script the body of a function; its imports stay where they are. The one under test may be
        called check."""
        imports = [node for node in tree.body if isinstance(node, IMPORTS)]
        check, = ast.parse("def __check__(candidate): pass").body
        check.body = [node for node in tree.body if node not in imports] or check.body
        tree.body = imports + [check]
        return check

    def mentions(self, node):
        return any(isinstance(inner, ast.Name) and inner.id in self.marked for inner in ast.walk(node))

    def asserts(self, node):
        return any(isinstance(inner, ast.Raise) or isinstance(inner, ast.Assert) and not is_true(inner.test)
                   for inner in ast.walk(node))

    def mark(self, node):
        """Mark the names that a statement binds to something that can reach the candidate or
        fail."""
        if isinstance(node, DEFINITIONS):
            if self.mentions(node) or self.asserts(node):
                self.marked.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and self.mentions(node):
            self.marked |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)
                            and isinstance(inner.ctx, ast.Store)}

    def split(self, statements):
        """Lists of statements, one a test."""
        groups, group = [], []
        for statement in statements:
            self.mark(statement)
            group.append(statement)
            if self.checks(statement):
                groups.append(group)
                group = []
        if group and (self.reaches(group) or not groups):
            groups.append(group)
        elif group:
            groups[-1] += group
        if not any(map(self.reaches, groups)):
            raise ValueError("the tests never call the candidate")
        return groups

    def reaches(self, statements):
        return any(self.mentions(node) for node in statements if not isinstance(node, DEFINITIONS))

    def checks(self, node):
        """Whether a statement can fail for a wrong value."""
        if isinstance(node, ast.Assert):
            return not is_true(node.test)
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, (ast.With, ast.Try)):
            return self.mentions(node) or self.asserts(node)
        if isinstance(node, (ast.For, ast.While, ast.If)):
            return any(map(self.checks, node.body + node.orelse))
        if isinstance(node, ast.Match):
            return any(self.checks(inner) for case in node.cases for inner in case.body)
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
            return False
        call = node.value
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        if name in HARMLESS:
            return False
        is_helper = isinstance(call.func, ast.Name) and name in self.marked - self.candidates
        return is_helper or any(map(self.mentions, [*call.args, *call.keywords]))

    def reported(self, statements):
        """The statements of one test, in a `with` that reports how it went."""
        test, = ast.parse("with __judge__.test(): pass").body
        test.body = statements
        return test


class RowFault(BaseException):
    """The row's own fault, or a value that cannot be carried: there is no verdict."""


class Report:
    """What the tests call `__judge__`: counts them, and says a character for each. Of the first that fails it
    keeps why, as the name of a built-in exception: no text of a program or a test may reach the supervisor,
    whose memory every later program inherits."""

    def __init__(self, total, say):
        self.total, self.say = total, say
        self.done, self.detail = 0, ""

    def test(self):
        """The context that each test runs in."""
        return self

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        self.record(kind)
        return True

    def record(self, kind):
        if self.done == self.total:
            return
        code, why = self.judged(kind)
        self.done += 1
        self.say(code)
        if code != "." and not self.detail:
            self.detail = f"test {self.done}"
            if is_builtin(why) and why != "AssertionError" and code not in "ko":
                self.detail += f": {why}"

    def judged(self, kind):
        """(character, name) of a test that ended with an exception of this kind, or with None."""
        if kind is None:
            return ".", ""
        return {AssertionError: "w", MemoryError: "m"}.get(kind, "e"), kind.__name__

    def run(self, check):
        """Run the tests. Those that are not reached have failed."""
        kind = AssertionError
        try:
            check()
            if self.done and not self.detail:  # else a `return` before the last test
                kind = None
        except RowFault:
            raise
        except BaseException as error:
            kind = type(error)
        while self.done < self.total:
            self.record(kind)


class WithoutMessages(ast.NodeTransformer):
    """Where a test has failed, a name that its message does not know is no fault of the row."""

    def visit_Assert(self, node):
        node.msg = None
        return node

    def visit_Raise(self, node):
        if not isinstance(node.exc, ast.Call) or getattr(node.exc.func, "id", "") == "NameError":
            return node
        guard, = ast.parse("try: pass\nexcept NameError: raise AssertionError from None").body
        guard.body = [node]
        return guard


def calls_check(node):
    """Whether a statement is the call of `check` that some data sets end with."""
    call = getattr(node, "value", None)
    return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "check"


def is_true(node):
    return isinstance(node, ast.Constant) and bool(node.value)


def undefined(tree):
    """Names of classes that the tests use and do not bind anywhere."""
    bound, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, DEFINITIONS):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
    return {name for name in used - bound if name[:1].isupper()}
