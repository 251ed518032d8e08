"""The command line: everything the API does for operators, officers and auditors, and what works offline."""
