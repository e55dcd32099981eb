# ruff: noqa: N801, S105 - class names are those that users' code imports; a name with TOKEN in it is no password
"""What are the metrics called?

Names only, without their prefix (`name_prefix`). They are those that dashboards made for Dynamo query; what each
one counts, and which of them this version exports, is in `docs/reference/metrics.md`.
"""


class name_prefix:
    """What stands before a name, joined with an underscore."""

    COMPONENT = "dynamo_component"
    FRONTEND = "dynamo_frontend"
    ROUTER = "dynamo_router"
    REQUEST_PLANE = "dynamo_request_plane"
    TRANSPORT = "dynamo_transport"
    WORK_HANDLER = "dynamo_work_handler"
    REJECTION = "dynamo_rejection"


class labels:
    """Label names."""

    NAMESPACE = "dynamo_namespace"
    COMPONENT = "dynamo_component"
    ENDPOINT = "dynamo_endpoint"
    WORKER_ID = "worker_id"
    WORKER_TYPE = "worker_type"
    DP_RANK = "dp_rank"
    MODEL = "model"
    MODEL_NAME = "model_name"
    ROUTER_ID = "router_id"


class distributed_runtime:
    """One a runtime (`dynamo_component_`)."""

    UPTIME_SECONDS = "uptime_seconds"


class work_handler:
    """Serving an endpoint (`dynamo_component_`) and the listener beneath it (`dynamo_work_handler_`)."""

    REQUESTS_TOTAL = "requests_total"
    REQUEST_DURATION_SECONDS = "request_duration_seconds"
    INFLIGHT_REQUESTS = "inflight_requests"
    REQUEST_BYTES_TOTAL = "request_bytes_total"
    RESPONSE_BYTES_TOTAL = "response_bytes_total"
    CANCELLATION_TOTAL = "cancellation_total"
    ERRORS_TOTAL = "errors_total"
    NETWORK_TRANSIT_SECONDS = "network_transit_seconds"
    TIME_TO_FIRST_RESPONSE_SECONDS = "time_to_first_response_seconds"
    PERMIT_WAIT_SECONDS = "permit_wait_seconds"
    POOL_ACTIVE_TASKS = "pool_active_tasks"
    POOL_CAPACITY = "pool_capacity"
    QUEUE_DEPTH = "queue_depth"
    QUEUE_CAPACITY = "queue_capacity"
    ENQUEUE_REJECTED_TOTAL = "enqueue_rejected_total"

    ERROR_TYPE_LABEL = "error_type"


class request_plane:
    """Calling an endpoint (`dynamo_request_plane_`)."""

    QUEUE_SECONDS = "queue_seconds"
    SEND_SECONDS = "send_seconds"
    ROUNDTRIP_TTFT_SECONDS = "roundtrip_ttft_seconds"
    INFLIGHT_REQUESTS = "inflight_requests"


class transport:
    """The sockets beneath both (`dynamo_transport_`)."""

    class tcp:
        """The request plane over TCP."""

        POOL_ACTIVE = "tcp_pool_active"
        POOL_IDLE = "tcp_pool_idle"
        BYTES_SENT_TOTAL = "tcp_bytes_sent_total"
        BYTES_RECEIVED_TOTAL = "tcp_bytes_received_total"
        ERRORS_TOTAL = "tcp_errors_total"
        SERVER_QUEUE_DEPTH = "tcp_server_queue_depth"
        ACCEPT_BACKOFF_TOTAL = "tcp_accept_backoff_total"

    class nats:
        """The connection to NATS. `connected` is this project's own."""

        ERRORS_TOTAL = "nats_errors_total"
        CONNECTED = "nats_connected"


class event_plane:
    """Publishing and receiving events (`dynamo_component_`). These names are this project's own."""

    PUBLISHED_TOTAL = "event_plane_published_total"
    OVERFLOWS_TOTAL = "event_plane_overflows_total"
    RECEIVED_TOTAL = "event_plane_received_total"
    MISSED_TOTAL = "event_plane_missed_total"
    DUPLICATES_TOTAL = "event_plane_duplicates_total"
    REJECTED_TOTAL = "event_plane_rejected_total"
    PUBLISHERS = "event_plane_publishers"

    TOPIC_LABEL = "topic"
    STATE_LABEL = "state"


class health:
    """The canary (`dynamo_component_`). This name is this project's own."""

    CANARY_TOTAL = "canary_total"
    OUTCOME_LABEL = "outcome"


class frontend_service:
    """The HTTP front door (`dynamo_frontend_`, or what the variable of `METRICS_PREFIX_ENV` says)."""

    METRICS_PREFIX_ENV = "DYN_METRICS_PREFIX"

    REQUESTS_TOTAL = "requests_total"
    REQUESTS_STARTED_TOTAL = "requests_started_total"
    FAILURES_TOTAL = "failures_total"
    ACTIVE_REQUESTS = "active_requests"
    INFLIGHT_REQUESTS = "inflight_requests"
    QUEUED_REQUESTS = "queued_requests"
    DISCONNECTED_CLIENTS = "disconnected_clients"
    REQUEST_DURATION_SECONDS = "request_duration_seconds"
    TIME_TO_FIRST_TOKEN_SECONDS = "time_to_first_token_seconds"
    INTER_TOKEN_LATENCY_SECONDS = "inter_token_latency_seconds"
    INPUT_SEQUENCE_TOKENS = "input_sequence_tokens"
    OUTPUT_SEQUENCE_TOKENS = "output_sequence_tokens"
    OUTPUT_TOKENS_TOTAL = "output_tokens_total"
    CACHED_TOKENS = "cached_tokens"
    TOKENIZER_LATENCY_MS = "tokenizer_latency_ms"
    EMBEDDING_LATENCY_SECONDS = "embedding_latency_seconds"
    KV_HIT_RATE = "kv_hit_rate"

    MODEL_READY = "model_ready"
    MODEL_TOTAL_KV_BLOCKS = "model_total_kv_blocks"
    MODEL_MAX_NUM_SEQS = "model_max_num_seqs"
    MODEL_MAX_NUM_BATCHED_TOKENS = "model_max_num_batched_tokens"
    MODEL_CONTEXT_LENGTH = "model_context_length"
    MODEL_KV_CACHE_BLOCK_SIZE = "model_kv_cache_block_size"
    MODEL_MIGRATION_LIMIT = "model_migration_limit"
    MODEL_MIGRATION_TOTAL = "model_migration_total"
    MODEL_MIGRATION_DURATION_SECONDS = "model_migration_duration_seconds"
    MODEL_MIGRATION_MAX_SEQ_LEN_EXCEEDED_TOTAL = "model_migration_max_seq_len_exceeded_total"
    MODEL_CANCELLATION_TOTAL = "model_cancellation_total"
    MODEL_REJECTION_TOTAL = "model_rejection_total"

    WORKER_ACTIVE_DECODE_BLOCKS = "worker_active_decode_blocks"
    WORKER_ACTIVE_PREFILL_TOKENS = "worker_active_prefill_tokens"
    WORKER_LAST_TIME_TO_FIRST_TOKEN_SECONDS = "worker_last_time_to_first_token_seconds"
    WORKER_LAST_INPUT_SEQUENCE_TOKENS = "worker_last_input_sequence_tokens"
    WORKER_LAST_INTER_TOKEN_LATENCY_SECONDS = "worker_last_inter_token_latency_seconds"

    ROUTER_QUEUE_PENDING_REQUESTS = "router_queue_pending_requests"
    ROUTER_QUEUE_PENDING_ISL_TOKENS = "router_queue_pending_isl_tokens"
    ROUTER_QUEUE_PENDING_CACHED_TOKENS = "router_queue_pending_cached_tokens"
    ROUTER_ADMISSION_RECEIVED_TOTAL = "router_admission_received_total"
    ROUTER_ADMISSION_REJECTED_TOTAL = "router_admission_rejected_total"
    ROUTER_QUEUE_BACKPRESSURE_TOTAL = "router_queue_backpressure_total"

    MIGRATION_TYPE_LABEL = "migration_type"
    MIGRATION_OUTCOME_LABEL = "outcome"
    OPERATION_LABEL = "operation"

    class status:
        """Values of the label `status`."""

        SUCCESS = "success"
        ERROR = "error"

    class request_type:
        """Values of the label `request_type`."""

        STREAM = "stream"
        UNARY = "unary"

    class error_type:
        """Values of the label `error_type`."""

        NONE = ""
        VALIDATION = "validation"
        NOT_FOUND = "not_found"
        OVERLOAD = "overload"
        UNAVAILABLE = "unavailable"
        CANCELLED = "cancelled"
        RESPONSE_TIMEOUT = "response_timeout"
        INTERNAL = "internal"
        NOT_IMPLEMENTED = "not_implemented"

    class migration_type:
        """Values of the label `migration_type`."""

        NEW_REQUEST = "new_request"
        ONGOING_REQUEST = "ongoing_request"

    class migration_outcome:
        """Values of the label `outcome`."""

        SUCCESS = "success"
        FAILURE = "failure"
        CANCELLED = "cancelled"

    class operation:
        """Values of the label `operation`."""

        TOKENIZE = "tokenize"
        DETOKENIZE = "detokenize"


class frontend_perf:
    """Where the front door's time goes (`dynamo_frontend_`)."""

    STAGE_REQUESTS = "stage_requests"
    STAGE_DURATION_SECONDS = "stage_duration_seconds"
    STAGE_PREPROCESS = "preprocess"
    STAGE_ROUTE = "route"
    STAGE_DISPATCH = "dispatch"
    TOKENIZE_SECONDS = "tokenize_seconds"
    TEMPLATE_SECONDS = "template_seconds"
    DETOKENIZE_TOTAL_US = "detokenize_total_us"
    DETOKENIZE_TOKEN_COUNT = "detokenize_token_count"
    TOKENIZER_CACHE_HITS_TOTAL = "tokenizer_cache_hits_total"
    TOKENIZER_CACHE_MISSES_TOTAL = "tokenizer_cache_misses_total"
    TOKENIZER_CACHE_CACHED_TOKENS_TOTAL = "tokenizer_cache_cached_tokens_total"
    TOKENIZER_CACHE_UNCACHED_TOKENS_TOTAL = "tokenizer_cache_uncached_tokens_total"
    EVENT_LOOP_DELAY_SECONDS = "event_loop_delay_seconds"
    EVENT_LOOP_STALL_TOTAL = "event_loop_stall_total"


class router:
    """Choosing workers (`dynamo_component_`)."""

    REQUESTS_STARTED_TOTAL = "router_requests_started_total"
    REQUESTS_TOTAL = "router_requests_total"
    TIME_TO_FIRST_TOKEN_SECONDS = "router_time_to_first_token_seconds"
    INTER_TOKEN_LATENCY_SECONDS = "router_inter_token_latency_seconds"
    INPUT_SEQUENCE_TOKENS = "router_input_sequence_tokens"
    OUTPUT_SEQUENCE_TOKENS = "router_output_sequence_tokens"
    KV_HIT_RATE = "router_kv_hit_rate"
    KV_BEST_ELIGIBLE_CACHED_PREFIX_TOKENS_TOTAL = "router_kv_best_eligible_cached_prefix_tokens_total"
    KV_SELECTED_CACHED_PREFIX_TOKENS_TOTAL = "router_kv_selected_cached_prefix_tokens_total"
    KV_WORKER_REUSED_TOKENS_TOTAL = "router_kv_worker_reused_tokens_total"
    NON_MAX_OVERLAP_SELECTIONS_TOTAL = "router_non_max_overlap_selections_total"
    OVERLAP_BLOCKS_LOST = "router_overlap_blocks_lost"
    WORKER_REGISTERED = "router_worker_registered"
    KV_EVENT_SOURCE_MISMATCH_WORKERS = "router_kv_event_source_mismatch_workers"
    APPROXIMATE_CACHE_CONFIGURED_POLICY = "router_approximate_cache_configured_policy"
    APPROXIMATE_CACHE_EFFECTIVE_POLICY = "router_approximate_cache_effective_policy"
    APPROXIMATE_CACHE_BLOCKS = "router_approximate_cache_blocks"


class routing_overhead:
    """What choosing costs, in milliseconds (`dynamo_router_`)."""

    BLOCK_HASHING_MS = "overhead_block_hashing_ms"
    INDEXER_FIND_MATCHES_MS = "overhead_indexer_find_matches_ms"
    SEQ_HASHING_MS = "overhead_seq_hashing_ms"
    SCHEDULING_MS = "overhead_scheduling_ms"
    TOTAL_MS = "overhead_total_ms"


class kvrouter:
    """KV events as the index applies them (`dynamo_component_`)."""

    KV_CACHE_EVENTS_APPLIED = "kv_cache_events_applied"
    KV_CACHE_EVENT_WARNINGS = "kv_cache_event_warnings"


class kv_ingress:
    """Sources of KV events as a router follows them (`dynamo_component_`)."""

    BATCHES_TOTAL = "router_kv_zmq_ingress_batches_total"
    LIFECYCLE_TOTAL = "router_kv_zmq_ingress_lifecycle_total"
    SOURCES = "router_kv_zmq_ingress_sources"
    INDEX_BLOCKS = "router_kv_index_blocks"


class kv_publisher:
    """KV events on their way from an engine to the event plane (`dynamo_component_`)."""

    ENGINES_DROPPED_EVENTS_TOTAL = "kv_publisher_engines_dropped_events_total"
    ZMQ_EVENTS_TOTAL = "kv_publisher_zmq_events_total"
    ZMQ_FILTERED_EVENTS_TOTAL = "kv_publisher_zmq_filtered_events_total"
    ZMQ_CONVERSION_ISSUES_TOTAL = "kv_publisher_zmq_conversion_issues_total"
    ZMQ_SUSPICIOUS_EVENTS_TOTAL = "kv_publisher_zmq_suspicious_events_total"


class kvstats:
    """An engine's KV cache (`dynamo_component_`)."""

    TOTAL_BLOCKS = "total_blocks"
    GPU_CACHE_USAGE_PERCENT = "gpu_cache_usage_percent"
    KV_CACHE_HIT_RATE = "kv_cache_hit_rate"


class model_info:
    """A worker's model (`dynamo_component_`)."""

    LOAD_TIME_SECONDS = "model_load_time_seconds"


class lifecycle:
    """Stopping a worker (`dynamo_component_`)."""

    CLEANUP_TIME_SECONDS = "cleanup_time_seconds"
    DRAIN_TIME_SECONDS = "drain_time_seconds"
