"""Average@k: problems and verifiers, models and their samples, the report, and preferences for DPO.

May import `files` and `user_code`.
"""
