#!/usr/bin/env bash
# Make the two roles that cluster.yaml names, for one bucket; once per account, and again without harm.
#
#   deploy/aws_roles.sh BUCKET
#
# rayloop-worker: read and write the bucket. rayloop-head: that, start and end machines, hand them
# rayloop-worker, and look up the images. Needs the `aws` command, signed in as who may make roles.
set -euo pipefail
bucket=${1:?"deploy/aws_roles.sh: no bucket given; usage: deploy/aws_roles.sh BUCKET"}
account=$(aws sts get-caller-identity --query Account --output text)

trust='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole",
  "Principal": {"Service": "ec2.amazonaws.com"}}]}'
storage='{"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetBucketLocation"],
    "Resource": "arn:aws:s3:::'$bucket'"},
  {"Effect": "Allow", "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject",
    "s3:AbortMultipartUpload"], "Resource": "arn:aws:s3:::'$bucket'/*"}'
machines='{"Effect": "Allow", "Action": ["ec2:Describe*", "ec2:RunInstances", "ec2:CreateTags",
    "ec2:TerminateInstances", "ec2:StartInstances", "ec2:StopInstances"], "Resource": "*"},
  {"Effect": "Allow", "Action": "iam:PassRole", "Resource": "arn:aws:iam::'$account':role/rayloop-worker"},
  {"Effect": "Allow", "Action": "ssm:GetParameters", "Resource": "arn:aws:ssm:*::parameter/aws/service/*"}'

role() {  # NAME STATEMENTS
  aws iam get-role --role-name "$1" >/dev/null 2>&1 ||
    aws iam create-role --role-name "$1" --assume-role-policy-document "$trust" >/dev/null
  aws iam put-role-policy --role-name "$1" --policy-name rayloop \
    --policy-document '{"Version": "2012-10-17", "Statement": ['"$2"']}'
  aws iam get-instance-profile --instance-profile-name "$1" >/dev/null 2>&1 || {
    aws iam create-instance-profile --instance-profile-name "$1" >/dev/null
    aws iam add-role-to-instance-profile --instance-profile-name "$1" --role-name "$1"
  }
  echo "$1 is ready"
}

role rayloop-worker "$storage"
role rayloop-head "$storage, $machines"
# Spot machines need a role of EC2's own, which the console makes unasked and a program does not.
aws iam get-role --role-name AWSServiceRoleForEC2Spot >/dev/null 2>&1 ||
  aws iam create-service-linked-role --aws-service-name spot.amazonaws.com >/dev/null
echo "spot machines may be started"
