-- What happened: frozen datasets, runs and their stages, evidence per model version.
CREATE TABLE exp.datasets (
    task text NOT NULL,
    version text NOT NULL,
    fingerprint text NOT NULL,
    query text NOT NULL,
    since timestamptz,
    until timestamptz,
    rows bigint NOT NULL,
    schema jsonb NOT NULL,
    path text NOT NULL,
    run_id text,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (task, version)
);

CREATE INDEX datasets_by_fingerprint ON exp.datasets (fingerprint);

CREATE TABLE exp.runs (
    run_id text PRIMARY KEY,
    pipeline text NOT NULL,
    profile text NOT NULL,
    task text NOT NULL,
    status text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz,
    parameters jsonb NOT NULL DEFAULT '{}',
    mlflow_run_id text,
    error text
);

CREATE INDEX runs_by_start ON exp.runs (started_at DESC);

CREATE TABLE exp.run_stages (
    run_id text NOT NULL REFERENCES exp.runs ON DELETE CASCADE,
    position integer NOT NULL,
    name text NOT NULL,
    status text NOT NULL,
    started_at timestamptz,
    seconds double precision,
    mlflow_run_id text,
    notebook text,
    outputs jsonb NOT NULL DEFAULT '{}',
    error text,
    PRIMARY KEY (run_id, name)
);

CREATE TABLE exp.replay_results (
    run_id text NOT NULL,
    model_name text NOT NULL,
    model_version text NOT NULL,
    baseline text NOT NULL,
    dataset_fingerprint text NOT NULL,
    metric text NOT NULL,
    estimate double precision,
    low double precision,
    high double precision,
    n bigint NOT NULL,
    baseline_estimate double precision,
    difference double precision,
    difference_low double precision,
    difference_high double precision,
    verdict text,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (run_id, model_name, model_version, baseline, metric)
);

CREATE INDEX replay_results_by_model ON exp.replay_results (model_name, model_version);
