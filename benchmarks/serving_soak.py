def soak(*a): raise SystemExit
