terraform {
  required_version = ">= 1.6"
  required_providers {
    kubernetes = {
      source  = "hashicorp/kubernetes"
      version = "~> 2.31"
    }
  }
}

variable "namespace" {
  description = "Namespace that the module makes and fills."
  type        = string
  default     = "mlops-workbench"
}

variable "image" {
  description = "Image of the workbench, with registry and tag, as the cluster pulls it."
  type        = string
}

variable "secrets" {
  description = "Values of the secrets that settings.ini refers to: PRODUCTION_DATABASE_URL."
  type        = map(string)
  sensitive   = true
  validation {
    condition     = length(setsubtract(["PRODUCTION_DATABASE_URL"], keys(var.secrets))) == 0
    error_message = "Give a value for each of PRODUCTION_DATABASE_URL."
  }
}

variable "storage" {
  description = "Credentials of the artefact store, such as AWS_ACCESS_KEY_ID; empty where the pods' role is enough."
  type        = map(string)
  default     = {}
  sensitive   = true
}

locals {
  files     = fileset("${path.module}/../kubernetes", "*.yaml")
  documents = flatten([for f in local.files : split("\n---\n", file("${path.module}/../kubernetes/${f}"))])
  objects   = [for d in local.documents : yamldecode(replace(d, "mlops-workbench:0.1.0", var.image))]
}

resource "kubernetes_namespace_v1" "this" {
  metadata {
    name = var.namespace
  }
}

resource "kubernetes_secret_v1" "settings" {
  metadata {
    name      = "mlops-workbench-secrets"
    namespace = kubernetes_namespace_v1.this.metadata[0].name
  }
  data = var.secrets
}

resource "kubernetes_secret_v1" "storage" {
  metadata {
    name      = "mlops-workbench-storage"
    namespace = kubernetes_namespace_v1.this.metadata[0].name
  }
  data = var.storage
}

resource "kubernetes_manifest" "this" {
  for_each = { for o in local.objects : "${o.kind}/${o.metadata.name}" => o }
  manifest = merge(each.value, { metadata = merge(each.value.metadata, { namespace = var.namespace }) })

  depends_on = [kubernetes_namespace_v1.this, kubernetes_secret_v1.settings, kubernetes_secret_v1.storage]
}

output "service" {
  description = "Address of the service inside the cluster."
  value       = "http://mlops-workbench-service.${var.namespace}.svc:8080"
}
