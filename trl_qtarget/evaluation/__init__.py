"""Average@k: problems and verifiers, models and their samples, the report, and preference pairs for DPO.

May import `files` and `user_code`.
"""
