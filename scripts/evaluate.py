"""Score the pretrained model, the experts and every merged model of a run; write results.json, a table and figures."""

from common.command import run
from common.evaluation.scoring import score_run

if __name__ == "__main__":
    run(score_run, None, __doc__)
