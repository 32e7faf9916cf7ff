-- What monitoring found, window by window: alerts, triggers and pages read it. A window that is looked at again gets another report.
CREATE TABLE exp.monitor_reports (
    report_id text PRIMARY KEY,
    policy text NOT NULL,
    task text NOT NULL,
    reference text NOT NULL,
    window_from timestamptz NOT NULL,
    window_until timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    severity text NOT NULL CHECK (severity IN ('none', 'low', 'medium', 'high')),
    broken boolean NOT NULL,
    n_rows bigint NOT NULL,
    findings jsonb NOT NULL DEFAULT '[]',
    words text NOT NULL,
    run_id text,
    CHECK (window_from < window_until)
);

CREATE INDEX monitor_reports_by_policy ON exp.monitor_reports (policy, window_until DESC, created_at DESC);
