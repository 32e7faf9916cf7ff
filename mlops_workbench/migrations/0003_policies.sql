-- Which model version, with which settings, serves whom. No model means the rule-based policy.
CREATE TABLE exp.policies (
    policy text PRIMARY KEY,
    task text NOT NULL,
    description text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE exp.policy_versions (
    policy text NOT NULL REFERENCES exp.policies,
    version integer NOT NULL,
    model_name text,
    model_version text,
    settings jsonb NOT NULL DEFAULT '{}',
    status text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (policy, version),
    CHECK ((model_name IS NULL) = (model_version IS NULL))
);

CREATE UNIQUE INDEX one_production_version ON exp.policy_versions (policy) WHERE status = 'production';
