"""A saved layout for W&B: a workspace with a section for each figure of the paper, and a report that compares runs.

``python -m rsdyn.tracking.workspace`` builds both through the optional ``wandb-workspaces`` and saves them where
there is a key;
``--print`` shows what would be sent, without a server. What is drawn follows the table of ``rsdyn/tracking/keys.py``.
"""
