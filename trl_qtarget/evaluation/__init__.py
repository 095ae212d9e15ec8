"""Average@k: problems and verifiers, models and their samples, the report, and preference pairs for DPO.

May import `data`, `files` and `user_code`.
"""
