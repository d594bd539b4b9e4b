"""Console, record of a run, results, tables, verdict, pictures and page (`html`). Everything shown is computed from two files of a run:

`record.jsonl`  one JSON object per line, each with a "kind" (see `record`); what happened, in order.
`results.json`  what came out, written once at the end (see `results`); its layout, kept stable under "format": 1:

    format        1
    recipe        the resolved recipe;  recipe_name: str
    part          [I, N] of a run in parts: rows and trainings are those of the I-th share alone; not there in a whole run
    data          name, source, md5 (or null), synthetic: bool, counts: {train, val, test, victims, tuning, judge, ...}
    versions      {python, torch, timm, gidef, ...: str};  hardware: {...}
    seeds         [int];  world_size: int;  threads: int
    seconds       {total, train: {"<defence>/<seed>": s}, attack: {"<name>": s}}
    weights_sha256 {"<defence>/<seed>": hex of the best round's weights}
    training      [one per defence and seed: defence, seed, epsilon, delta, rounds, best_round, val_accuracy, test_accuracy, macro_f1, auc,
                  client_accuracy_mean, client_accuracy_worst, seconds_per_round, bytes_per_round]
    tuned         {"<defence>": field, value, target, tried: [[value, validation accuracy]]}: of those at a wanted accuracy
    rows          [one per defence, attack and checkpoint:
                  defence, attack: names in the recipe;  attack_id: "A0" naive … "A12" decoder on the given latent (gidef.config.attacks), "standard" the worst
                  case per victim of an ensemble, "control" a shuffled gradient, or "own"
                  checkpoint: "untrained" | "early" | "final";  seed: int, or seeds: [int] where several are pooled
                  share_policy: "full" | "head" | "all"
                  threat: {name: str, the threat model in words, server: "honest but curious" | "malicious", release: "gradient" | "delta",
                  batch_size: int, clients_in_sum: int, above 1 where the server sees sums alone, labels: "known" | "counts" | "recovered" | "searched" | "soft",
                  batch_norm: "none in the model" | "eval" | "train";  statistics: "batch" | "running" | "none", what is known of those of BatchNorm, ...}
                  epsilon, delta: of a differentially private training, null of others (epsilon alone null: infinite);  privacy_unit: "image" | "client";
                  noise_multiplier: of these
                  victims: images attacked;  failed: of these, without a reconstruction (scored as mid-grey)
                  client_accuracy: test accuracy of the defence's final model, whatever the checkpoint;  attacker_accuracy: in [0, 1];  mse;  psnr_db;  ssim
                  above_class_mean_db: PSNR less that of the victim's class mean, paired
                  certified_bits: of an image in a release, no attack learns more;  releases: that this attack sees;  fano: bound on naming the image among
                  all training images by these;  uncertified: why there is no such bound;  lifetime_bits, lifetime_releases, lifetime_fano: of the whole
                  training;  uncertified_lifetime: why there is none
                  attacker_accuracy_by: {name of a further judge: as attacker_accuracy}, where there are any
                  label_recovery: share of the labels that attacks which did not fail had right (null if all failed);  oracle_restart_psnr_db: had the truth chosen the start
                  fit_first, fit: median distance of the matched updates at the start and at the end
                  ensemble: name of the ensemble that the attack is a member of;  version, members, worst_by: of an ensemble's own row
                  calibration: how many attacks ran as one program, how, and what else was tried
                  in_loop_psnr_db: of the clients' own decoder, beside a post-hoc one (A12)
                  iterations, restarts: int;  seconds: float;  note: str]
    not_applicable [defence, attack, attack_id, reason: of attacks that have nothing to attack in a defence, and so no row]
    bounds        [name: "constant grey" | "mean image" | "class mean" | "nearest public neighbour" | "shuffled gradient";
                  mse, psnr_db, ssim, attacker_accuracy, attacker_accuracy_by: what a guess without any gradient scores on the same victims]
    judge         {accuracy_on_truth, accuracy_on_test, chance: in [0, 1];  others: {name of a further judge: its two accuracies}}
    pictures      [paths relative to results.json]
    verdict       [sentences, see `verdict`]

A measured value is a number, null, or {mean, low, high, worst, worst_decile}: the mean over victims (per-image values), its
95 % bootstrap interval, the most leaked image and the mean of the most leaked tenth. Accuracies lie in [0, 1], PSNR is in dB.
JSON has no NaN and no infinity: both become null, so a metric that can be infinite is capped by whoever measures it.
"""

from gidef.report import html, results, tables
from gidef.report.console import Console
from gidef.report.pictures import attack_curves, grid, learning_curves, partition_bars, preview
from gidef.report.record import Record, read
from gidef.report.verdict import verdict

__all__ = [
    "Console",
    "Record",
    "attack_curves",
    "grid",
    "html",
    "learning_curves",
    "partition_bars",
    "preview",
    "read",
    "results",
    "tables",
    "verdict",
]
