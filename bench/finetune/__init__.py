"""Do these initializations fine-tune better? The paper's tables, at any size, from one command.

    python -m bench.finetune TABLE --model PATH --data PATH

TABLE names a file of tables/; a run is one setting there, a row of JSON in the results, and tables and plots are drawn
from the rows alone.
"""
