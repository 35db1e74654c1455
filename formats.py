"""Test formats."""
def normalize(row):
    return {"preamble": row.get("preamble") or "", "test": row["test"], "entry_point": row["entry_point"], "solution": row.get("solution")}
